"""From the original files to today's names, and back."""

import sys
from importlib import import_module


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

for _name, _home in _ELSEWHERE.items():
    globals()[_name] = sys.modules[f"{__name__}.{_name}"] = import_module(f"..{_home}", __name__)
