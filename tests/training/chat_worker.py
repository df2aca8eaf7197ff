"""One of several processes that fine-tune together: `chat_worker.py CONFIGS`, a JSON list of options of `train_chat`.

With `ACCELERATE_USE_FSDP` set, FSDP runs on the CPU: accelerate has it for accelerators alone, so it is told that the
CPU is one.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from viscpm_hf.training import ChatTrainingConfig, train_chat


torch.distributed.init_process_group("gloo")
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    prepare_backend = PartialState._prepare_backend

    def prepare(self, *args, **kwargs):
        backend, kind = prepare_backend(self, *args, **kwargs)
        return backend, DistributedType.MULTI_GPU if kind == DistributedType.MULTI_CPU else kind

    PartialState._prepare_backend = prepare

for options in json.loads(sys.argv[1]):
    source = options.pop("continue_from", None)
    if source is not None:  # a copy of another run, up to its first checkpoint
        if os.environ["RANK"] == "0":
            checkpoints = Path(options["output"]) / "checkpoints"
            checkpoints.mkdir(parents=True)
            shutil.copy(Path(source) / "checkpoints" / "training.json", checkpoints)
            first = min((Path(source) / "checkpoints").glob("checkpoint-*"))
            shutil.copytree(first, checkpoints / first.name)
        torch.distributed.barrier()
    result = train_chat(ChatTrainingConfig(**options))
    if os.environ["RANK"] == "0":
        losses = [entry["loss"] for entry in result.log if "loss" in entry]
        (Path(options["output"]) / "losses.json").write_text(json.dumps(losses))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
torch.distributed.destroy_process_group()
