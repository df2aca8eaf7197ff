"""Muon for the linear layers, AdamW for everything else: one optimizer to those who use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ..version import require


MUON = "muon"
# torch has Muon since.
MUON_TORCH = "2.9"


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) orthogonalizes the updates of the linear layers; AdamW updates
    embeddings, convolutions, norms and biases.

    Muon's steps are scaled to those of AdamW (arXiv:2502.16982), so both go by the same learning rate.

    Args:
        model: whose trainable weights are updated.
        lr: learning rate.
        betas: AdamW's.
        weight_decay: of all weights but those of one dimension.

    Raises:
        ImportError: if torch is too old for Muon.
        ValueError: if nothing is trained.
    """

    def __init__(
        self, model: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0
    ):
        require(torch=MUON_TORCH)
        linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        linears -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}  # a tied head
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if id(parameter) in linears]
        others = [parameter for parameter in trained if id(parameter) not in linears and parameter.ndim > 1]
        vectors = [parameter for parameter in trained if parameter.ndim < 2]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        groups = [{"params": others, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        if groups := [group for group in groups if group["params"]]:
            self.parts.append(torch.optim.AdamW(groups, lr=lr, betas=betas))
        if not self.parts:
            raise ValueError("The model has no weights to train: all are frozen.")
        # The groups are the parts' own, so that what a scheduler writes into them reaches the parts.
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def muon_factory(arguments: TrainingArguments) -> tuple[Callable, dict[str, Any]]:
    """What the `Trainer` takes as `optimizer_cls_and_kwargs`.

    Raises:
        ValueError: where weights are spread over processes, for no process has a whole matrix then.
    """
    if arguments.fsdp or arguments.deepspeed or arguments.distributed_state.distributed_type in ("FSDP", "DEEPSPEED"):
        raise ValueError("Muon needs whole matrices, and FSDP and DeepSpeed spread them: choose another optimizer.")
    options = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "weight_decay": arguments.weight_decay,
    }
    return lambda: MuonWithAdamW, options
