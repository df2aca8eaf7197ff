"""When transformers and diffusers get to know our classes: as soon as they are used, and not before.

Torch and the models behind both libraries take seconds to import, and `viscpm-hf --help` needs none. So
`import viscpm_hf` imports nothing of theirs: it waits, as a finder of Python's import system, for the first import of
transformers, or of a room of ours that is built on it. What our classes need follows while that import lasts, for
which every other thread waits: later, threads that load models at the same time would find each other's modules half
there.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

from .quiet import quiet, uncollected


# Rooms that registering imports, but for what in them needs neither library.
ROOMS = tuple(f"{__package__}.{room}" for room in ("modeling", "families", "checkpoints", "pipelines", "loading"))
LIGHT = frozenset(
    f"{__package__}.{name}"
    for name in """
    loading loading.diffusers families families.diffusion_shapes families.family families.key_maps families.known_sizes
    families.model_shapes families.systems modeling modeling.configuration_limits modeling.decoding_presets
    modeling.original_vision_resampler modeling.token_ids_cpm_bee checkpoints checkpoints.adapters checkpoints.archive
    checkpoints.composite checkpoints.errors checkpoints.headers checkpoints.json_files checkpoints.key_matching
    checkpoints.location checkpoints.original checkpoints.stored_quantization checkpoints.visualcla_adapter
    """.split()
)
# Of loggers that tell of what can't be had here as soon as they are imported.
LOUD = ("torchao", "torch.utils._pytree", "huggingface_hub.serialization._torch")


def register() -> None:
    """Makes both libraries know our classes, now or when they are first used; a second call changes nothing."""
    _when(_is_use_of_transformers, register_models, "transformers" in sys.modules)
    _when(lambda name: name == "diffusers", register_pipelines, "diffusers" in sys.modules)


def register_models() -> None:
    from .loading import diffusers, from_pretrained
    from .pipelines import opening

    from_pretrained.register()
    opening.opener = diffusers.open_pipeline


def register_pipelines() -> None:
    from .loading.diffusers import extend_diffusers

    extend_diffusers()


def _is_use_of_transformers(name: str) -> bool:
    return name == "transformers" or (name.startswith(ROOMS) and name not in LIGHT)


def _when(is_awaited: Callable[[str], bool], act: Callable[[], None], is_here: bool) -> None:
    if is_here:
        with quiet(*LOUD), uncollected():
            act()
    elif not any(isinstance(finder, Waiting) and finder.act is act for finder in sys.meta_path):
        sys.meta_path.insert(0, Waiting(is_awaited, act))


class Waiting(importlib.abc.MetaPathFinder):
    """Acts once, right after the first import of a module that is awaited."""

    def __init__(self, is_awaited: Callable[[str], bool], act: Callable[[], None]):
        self.is_awaited, self.act = is_awaited, act
        self._is_looking = False

    def find_spec(self, name: str, path=None, target=None):
        if self._is_looking or not self.is_awaited(name):
            return None
        self._is_looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._is_looking = False
        if spec is not None:  # which may be all that is asked for: only an import is a use
            load = spec.loader.exec_module

            def load_and_act(module) -> None:
                is_first = self in sys.meta_path
                if is_first:
                    sys.meta_path.remove(self)
                try:
                    with quiet(*LOUD), uncollected():
                        load(module)
                        if is_first:
                            self.act()
                except BaseException:
                    if is_first:
                        sys.meta_path.insert(0, self)
                    raise

            spec.loader.exec_module = load_and_act
        return spec
