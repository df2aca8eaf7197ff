"""VisCPM-Chat as a model of lmms-eval.

    pip install . lmms-eval
    python examples/lmms_eval_viscpm.py --model viscpm --model_args pretrained=OUT \
        --tasks mmbench_cn_dev,pope --batch_size 8 --output_path logs/

Every option is lmms-eval's own; this file only tells it of the model. `accelerate launch --num_processes N` in place
of `python` runs N processes, one a GPU. `model_args` are arguments of `VisCPMChat`, such as `quantization=nf4`, and
`mode`: `generate` (greedy unless a task says otherwise), or `reference` for the original's beam search with its own
parameters.

For single-image tasks: VisCPM-Chat was trained on one picture a conversation.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from tqdm import tqdm

from viscpm_hf import VisCPMChat
from viscpm_hf.chat.answering import ChatRequest


try:
    from lmms_eval.api.model import lmms
except ImportError:  # the class can be tried without
    lmms = object

# What a task may say of decoding, of all that it may say.
GENERATION = ("max_new_tokens", "temperature", "top_p", "num_beams")
IMAGE_TOKEN = "<image>"


class VisCPM(lmms):
    """Answers tasks of the kind `generate_until`."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "openbmb/VisCPM-Chat",
        batch_size: int | str = 1,
        device: str | None = None,
        mode: str = "generate",
        seed: int = 0,
        **options: Any,
    ) -> None:
        from accelerate import Accelerator

        super().__init__()
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if self._world_size > 1 and torch.cuda.is_available():
            device = f"cuda:{self.accelerator.local_process_index}"
        self.chat = VisCPMChat(pretrained, device=device, **options)
        self.batch_size = int(batch_size)
        self.mode = mode
        self.seed = seed

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the requests' order; those with the same decoding share batches, the longest first."""
        answers: list[str] = [""] * len(requests)

        def decoding(index: int) -> str:
            return json.dumps(requests[index].args[1], sort_keys=True, default=str)

        order = sorted(range(len(requests)), key=lambda index: (decoding(index), -len(requests[index].args[0])))
        with tqdm(total=len(requests), disable=self._rank != 0, desc="VisCPM") as progress:
            for _, group in itertools.groupby(order, decoding):
                indices = list(group)
                for begin in range(0, len(indices), self.batch_size):
                    batch = indices[begin : begin + self.batch_size]
                    for index, answer in zip(batch, self._answer([requests[i] for i in batch]), strict=True):
                        answers[index] = answer
                        if hasattr(self, "cache_hook"):
                            self.cache_hook.add_partial("generate_until", requests[index].args, answer)
                    progress.update(len(batch))
        return answers

    def _answer(self, batch: list[Any]) -> list[str]:
        wishes = batch[0].args[1]
        chat_requests = [self._request(*request.args) for request in batch]
        generation = {} if self.mode == "reference" else decoding_options(wishes)
        turns = self.chat.ask_batch(chat_requests, mode=self.mode, seed=self.seed, **generation)
        until = wishes.get("until") or []
        return [cut(turn.answer, [until] if isinstance(until, str) else until) for turn in turns]

    def _request(self, context: str, wishes: dict, doc_to_visual: Any, doc_id: Any, task: str, split: str):
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        if len(images) > 1:
            raise ValueError(f"{task}, document {doc_id}: VisCPM-Chat takes one picture, got {len(images)}.")
        return ChatRequest(images[0] if images else None, context.replace(IMAGE_TOKEN, "").strip())

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("VisCPM-Chat answers tasks of the kind generate_until only.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("VisCPM-Chat answers tasks of the kind generate_until only.")


def decoding_options(wishes: dict[str, Any]) -> dict[str, Any]:
    """A task's wishes as arguments of `generate`; a temperature of 0 means greedy."""
    options = {name: wishes[name] for name in GENERATION if wishes.get(name)}
    options["do_sample"] = bool(wishes.get("do_sample", "temperature" in options) and "temperature" in options)
    if not options["do_sample"]:
        options.pop("temperature", None)
        options.pop("top_p", None)
    return options


def cut(answer: str, until: list[str]) -> str:
    """The answer before the first of the strings that end it."""
    ends = [place for text in until if text and (place := answer.find(text)) >= 0]
    return answer[: min(ends, default=len(answer))]


def main() -> None:
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    MODEL_REGISTRY_V2.register_manifest(ModelManifest("viscpm", simple_class_path="lmms_eval_viscpm.VisCPM"))
    cli_evaluate()


if __name__ == "__main__":
    main()
