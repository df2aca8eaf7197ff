"""From the original files to today's names, and back."""

import sys
from importlib import import_module
from types import ModuleType


# What reads checkpoints has rooms of its own; here are the paths that it was known by.
_ELSEWHERE = {
    "archive": "checkpoints.archive",
    "errors": "checkpoints.errors",
    "key_maps": "families.key_maps",
    "original": "checkpoints.original",
    "source": "checkpoints.location",
    "tensor_files": "checkpoints.tensor_files",
    "transfer": "checkpoints.transfer",
    "weight_transforms": "checkpoints.weight_transforms",
}


class _Moved(ModuleType):
    """Stands for a module, which is imported when something of it is wanted: some of them need torch."""

    def __getattr__(self, name: str):
        if name.startswith("__"):  # of which whoever looks through all modules asks
            raise AttributeError(name)
        package, _, own = self.__name__.rpartition(".")
        return getattr(import_module(f"..{_ELSEWHERE[own]}", package), name)


for _name in _ELSEWHERE:
    globals()[_name] = sys.modules[f"{__name__}.{_name}"] = _Moved(f"{__name__}.{_name}")
