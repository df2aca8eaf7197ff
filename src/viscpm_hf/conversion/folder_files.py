"""Files that every new folder has, whatever its model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME


if TYPE_CHECKING:
    from .plan import ConversionPlan


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_index(folder: Path, plan: ConversionPlan, weights_name: str, part: str = "") -> None:
    """The list of shards, if there is more than one."""
    prefix = f"{part}/" if part else ""
    files = [file for file in plan.files if file.is_model and file.path.rpartition("/")[0] == part]
    if len(files) < 2:
        return
    name = SAFE_WEIGHTS_INDEX_NAME if weights_name == "model" else f"{weights_name}.safetensors.index.json"
    weight_map = {transfer.target.name: file.path.removeprefix(prefix) for file in files for transfer in file.tensors}
    parameters = sum(transfer.target.numel for file in files for transfer in file.tensors)
    metadata = {"total_parameters": parameters, "total_size": sum(file.nbytes for file in files)}
    write_json(folder / part / name, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
