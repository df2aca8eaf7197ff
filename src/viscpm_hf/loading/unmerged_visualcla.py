"""VisualCLA made of its bases, for users who put the released adapter on with PEFT, as its README does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoints.key_matching import name_pattern, target_pattern
from ..families.key_maps import VISUALCLA
from ..modeling.modeling_vision_resampler import VisualCLAForConditionalGeneration


# Our parts by the names that the adapter's configuration knows: by them it says what is changed and what is replaced.
PROJECTION = "image_projection_layer"
PARTS = {
    PROJECTION: "resampler.projection",  # before what it is part of
    "visual_resampler": "resampler",
    "text_model": "language_model",
    "vision_model": "vision_tower",
}


class UnmergedVisualCLA(VisualCLAForConditionalGeneration):
    """The released model with the adapter in its weights, until PEFT puts that adapter on: then it leaves them.

    So it answers alike with and without `PeftModel.from_pretrained(model, lora_model)`. Its parts go by the release's
    names, and it is saved as any other VisualCLA.
    """

    _bases: Callable[[], Mapping[str, torch.Tensor]] | None = None

    @classmethod
    def of(
        cls, model: VisualCLAForConditionalGeneration, bases: Callable[[], Mapping[str, torch.Tensor]]
    ) -> UnmergedVisualCLA:
        """Makes a loaded model, in place, one of this class.

        Args:
            bases: reads the matrices that the adapter changes as they are without it, by their original names.
        """
        parts = {name: model.get_submodule(own) for name, own in PARTS.items()}
        resampler = model.resampler
        resampler.projection = nn.Identity()
        resampler.query = nn.Parameter(resampler.query[None], requires_grad=False)  # as the adapter has it
        model.__class__ = cls  # what `device_map` has put on the modules stays with them
        model._modules = parts
        model._bases = bases
        return model

    @property
    def language_model(self) -> nn.Module:
        return self.text_model

    @property
    def vision_tower(self) -> nn.Module:
        return self.vision_model

    def resampler(self, *args: Any) -> torch.Tensor:
        return self.image_projection_layer(self.visual_resampler(*args))

    @property
    def _checkpoint_conversion_mapping(self) -> dict[str, str]:
        """The adapter's names -> those of the modules here; PEFT asks for it."""
        return {f"^{name_pattern(entry.source)}": _tree_name(target_pattern(entry)) for entry in VISUALCLA.entries}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # What PEFT does last when it puts an adapter on. The release's replaces a part that no other has.
        if name == "peft_config" and any(PROJECTION in (each.modules_to_save or ()) for each in value.values()):
            self._take_adapter_out()

    @torch.no_grad()
    def _take_adapter_out(self) -> None:
        bases, self._bases = self._bases, None
        for name, tensor in ({} if bases is None else bases()).items():
            prefix, _, rest = name.removesuffix(".weight").partition(".")
            layer = self.get_submodule(f"{prefix}.{rest.removeprefix(f'{prefix}.')}")
            weight = getattr(layer, "base_layer", layer).weight
            if weight.is_meta:
                raise ValueError(
                    "VisualCLA's adapter can't be put on layers that device_map has offloaded: leave "
                    "PeftModel.from_pretrained out, the adapter is in the weights already."
                )
            weight.copy_(tensor)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As every VisualCLA, by its own names."""
        with torch.device("meta"):
            model = VisualCLAForConditionalGeneration(self.config)
        state_dict = {_own_name(name): tensor for name, tensor in self.state_dict().items()}
        state_dict["resampler.query"] = state_dict["resampler.query"][0]
        model.load_state_dict(state_dict, assign=True)
        model.generation_config = self.generation_config
        model.save_pretrained(*args, **kwargs)


def _tree_name(name: str) -> str:
    """One of our names -> that of the module here."""
    return next(part + name.removeprefix(own) for part, own in PARTS.items() if name.startswith(f"{own}."))


def _own_name(name: str) -> str:
    return next(own + name.removeprefix(part) for part, own in PARTS.items() if name.startswith(f"{part}."))
