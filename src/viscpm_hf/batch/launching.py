"""A run over several processes, one a device, and the part that each of them has in it.

Every process finds its part from what `accelerate launch` and torchrun set in its environment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import PartialState

from .rows import InputRow


# What the launcher takes over while it runs.
ENDING_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
]

# The first process waits for the others, however long they take.
PATIENCE = timedelta(days=365)


@dataclass(frozen=True)
class Share:
    """A process's part in a run."""

    process: int = 0
    processes: int = 1
    local_process: int = 0
    """Among the processes of this machine."""

    @classmethod
    def of_this_process(cls) -> Share:
        if int(os.environ.get("WORLD_SIZE", 1)) < 2:
            return cls()
        state = _state()
        return cls(state.process_index, state.num_processes, state.local_process_index)

    @property
    def is_first(self) -> bool:
        return self.process == 0

    def wait_for_others(self) -> None:
        if self.processes > 1:
            _state().wait_for_everyone()

    def rows(self, rows: Iterable[InputRow], block: int) -> Iterator[InputRow]:
        """The rows of this process, dealt out in blocks. They follow from the input alone: what is finished may
        change while the processes look."""
        for row in rows:
            if row.index // block % self.processes == self.process:
                yield row

    def device(self, device: str | None) -> str | None:
        """The device of this process.

        Raises:
            ValueError: if the device is one that several processes would share.
        """
        if self.processes == 1:
            return device
        if device is None and torch.cuda.is_available():
            return f"cuda:{self.local_process}"
        if device is not None and ":" in device:
            raise ValueError(f"{self.processes} processes can't all run on {device}: leave --device out.")
        return f"cuda:{self.local_process}" if device == "cuda" else device


def _state() -> PartialState:
    # Nothing but waiting is done together, which needs no GPU.
    return PartialState(cpu=True, backend="gloo", timeout=PATIENCE)


def launch(arguments: Sequence[str], num_processes: int) -> None:
    """Runs `viscpm-hf ARGUMENTS` in several processes of this machine, as `accelerate launch` would.

    Raises:
        ValueError: for more processes than GPUs.
        RuntimeError: if one of them fails; the others are ended.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < num_processes:
        raise ValueError(f"{num_processes} processes were asked for, one a GPU, but there are {num_gpus} GPUs.")
    # The processes say themselves what went wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"viscpm-hf-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.2,
    )
    handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    try:
        elastic_launch(config, sys.executable)("-m", "viscpm_hf.cli", *arguments)
    except SignalException as error:
        raise KeyboardInterrupt from error
    except ChildFailedError as error:
        process, failure = error.get_first_failure()
        raise RuntimeError(
            f"Process {process} of {num_processes} ended with {failure.exitcode}; what it said stands above. Finished "
            "rows are kept: run it again to go on."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # it leaves its own
                signal.signal(number, handler)
