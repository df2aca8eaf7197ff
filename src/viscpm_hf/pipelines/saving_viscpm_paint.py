"""The code of a pipeline, saved beside its weights, so that the folder also loads where this package isn't installed.

diffusers puts a pipeline's files and those of its components into one flat folder, and of these only the ones that are
imported by the pipeline's, or the component's, own file. So the files are copied flat, and the first ones name all.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path


INDEX_NAME = "model_index.json"
PIPELINE_FILE, PIPELINE_CLASS = "pipeline_viscpm_paint", "VisCPMPaintPipeline"
# Components of ours, and the files of their classes.
COMPONENT_FILES = {"text_encoder": "modeling_viscpm_paint", "tokenizer": "tokenization_cpm_bee"}

RELATIVE_IMPORT = re.compile(r"^(\s*)from \.+(?:modeling\.)?(\w+) import", re.MULTILINE)
# Never runs: diffusers looks for these lines, not at what they are in.
ALL_FILES = "\n\nif False:  # for diffusers, which copies what is imported in this file, and no more\n{imports}\n"
ALL_FILES_MARK = "if False:  # for diffusers"


def save_code(folder: str | os.PathLike, file: str = PIPELINE_FILE, pipeline_class: str = PIPELINE_CLASS) -> None:
    """Writes a pipeline class' code into a saved pipeline's folder, and into its list of components where it is."""
    folder = Path(folder)
    _copy_with_imports(file, folder)
    index_file = folder / INDEX_NAME
    index = json.loads(index_file.read_text("utf-8"))
    index["_class_name"] = [file, pipeline_class]
    for name, component_file in COMPONENT_FILES.items():
        library, class_name = index.get(name) or (None, None)
        if library is not None and library.endswith(component_file):
            _copy_with_imports(component_file, folder / name)
            index[name] = [component_file, class_name]
    index_file.write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _copy_with_imports(name: str, folder: Path) -> None:
    """Copies a file and everything that it needs from this package."""
    needed = _needed(name)
    for file in needed:
        text = _flat_source(file)
        if file == name and ALL_FILES_MARK not in text and len(needed) > 1:
            others = [other for other in needed if other != name]
            text += ALL_FILES.format(imports="\n".join(f"    from .{other} import *" for other in others))
        (folder / f"{file}.py").write_text(text, "utf-8")


def _needed(name: str) -> list[str]:
    """A file and all that it imports of ours, however far away."""
    found, left = [], [name]
    while left:
        file = left.pop()
        if file not in found:
            found.append(file)
            left += [match[2] for match in RELATIVE_IMPORT.finditer(_flat_source(file))]
    return sorted(found)


def _flat_source(name: str) -> str:
    """A file's text, importing from its own folder only."""
    here = Path(__file__).parent
    places = (here / f"{name}.py", here.parent / "modeling" / f"{name}.py")
    path = next(path for path in places if path.is_file())
    return RELATIVE_IMPORT.sub(r"\1from .\2 import", path.read_text("utf-8"))
