"""Projections of the same input as one product: queries, keys and values, and the two halves of the gated MLP.

Fewer and larger products read their weights a little faster, and to read weights is what decoding does. Checkpoints
keep the names of the single projections: `save_pretrained` takes a fused model apart again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .row_products import RowLinear


class FusibleModule(nn.Module):
    """A module with projections that can be fused.

    `_fusible_projections`: the fused projection's name, and those of its parts in the order of their outputs.
    """

    _fusible_projections: tuple[str, tuple[str, ...]]

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs of the parts."""
        fused, parts = self._fusible_projections
        if fused in self._modules:
            return getattr(self, fused)(hidden_states).chunk(len(parts), dim=-1)
        return tuple(getattr(self, part)(hidden_states) for part in parts)

    @torch.no_grad()
    def fuse(self) -> None:
        fused, parts = self._fusible_projections
        if fused in self._modules:
            return
        weight = torch.cat([self._modules[part].weight for part in parts])
        self.add_module(fused, bias_free_linear(weight, self._modules[parts[0]].weight.requires_grad))
        for part in parts:
            delattr(self, part)

    @torch.no_grad()
    def unfuse(self) -> None:
        fused, parts = self._fusible_projections
        if fused not in self._modules:
            return
        weight = self._modules[fused].weight
        for part, rows in zip(parts, weight.chunk(len(parts)), strict=True):
            self.add_module(part, bias_free_linear(rows.clone(), weight.requires_grad))
        delattr(self, fused)


def bias_free_linear(weight: torch.Tensor, requires_grad: bool) -> RowLinear:
    linear = RowLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    return linear


def fusible_modules(model: nn.Module) -> dict[str, FusibleModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusibleModule)}


def is_fused(model: nn.Module) -> bool:
    return any(module._fusible_projections[0] in module._modules for module in fusible_modules(model).values())


def fusing_problem(model: nn.Module) -> str | None:
    """Why the model's projections can't be fused; None if they can, or are."""
    for name, module in fusible_modules(model).items():
        for part in module._fusible_projections[1]:
            projection = module._modules.get(part)
            if projection is None:  # fused already
                continue
            is_plain = type(projection) in (nn.Linear, RowLinear) and type(projection.weight) is nn.Parameter
            if not is_plain or projection.weight.is_meta or hasattr(projection, "_hf_hook"):
                return (
                    f"only plain weights in memory can be fused, but {name}.{part} is a {type(projection).__name__} "
                    f"with a {type(projection.weight).__name__} on {projection.weight.device}"
                )
    return None


def fuse_projections(model: nn.Module) -> None:
    """Fuses all projections of a model that can be; weights are copied layer by layer.

    Raises:
        ValueError: before anything is changed, if a projection is quantised, adapted or offloaded.
    """
    problem = fusing_problem(model)
    if problem is not None:
        raise ValueError(
            f"The projections stay single: {problem}. Fuse before quantising, after merging adapters, and without "
            "offload."
        )
    for module in fusible_modules(model).values():
        module.fuse()


def unfuse_projections(model: nn.Module) -> None:
    """Undoes [`fuse_projections`]."""
    for module in fusible_modules(model).values():
        module.unfuse()


def unfused_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's `state_dict` with the names of the single projections."""
    parts = {}
    for name, module in fusible_modules(model).items():
        fused, names = module._fusible_projections
        prefix = f"{name}." if name else ""
        parts[f"{prefix}{fused}.weight"] = [f"{prefix}{part}.weight" for part in names]
    unfused = {}
    for key, tensor in state_dict.items():
        if key in parts:
            rows = tensor.chunk(len(parts[key]))
            unfused |= {name: part.clone() for name, part in zip(parts[key], rows, strict=True)}
        else:
            unfused[key] = tensor
    return unfused


__all__ = [
    "FusibleModule",
    "fuse_projections",
    "fusing_problem",
    "is_fused",
    "unfuse_projections",
    "unfused_state_dict",
]
