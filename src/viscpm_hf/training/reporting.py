"""One line for every report of the trainer, for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Reporter(TrainerCallback):
    """Hands losses to `write` as they come."""

    def __init__(self, write: Callable[[str], None]):
        self.write = write

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self.write(f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            self.write(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"learning rate {logs['learning_rate']:.2e}  epoch {logs['epoch']:.2f}"
            )
