"""The model that comes with the package: where it is, its size, and its name."""

import os
from pathlib import Path

import pytest

import viscpm_hf
from viscpm_hf.tiny import embedded
from viscpm_hf.tiny.embedded import EMBEDDED_NAME, resolve_model, tiny


def test_the_name_stands_for_the_folders():
    assert viscpm_hf.tiny is tiny
    assert Path(tiny("chat"), "config.json").is_file()
    assert Path(tiny("paint"), "model_index.json").is_file()
    for kind in ("chat", "paint"):
        assert resolve_model(EMBEDDED_NAME, kind) == tiny(kind)
        assert resolve_model("some/folder", kind) == "some/folder"
        assert resolve_model(Path(EMBEDDED_NAME), kind) == Path(EMBEDDED_NAME)  # a folder of that name


def test_another_kind_is_named():
    with pytest.raises(ValueError, match="not as 'vision'"):
        tiny("vision")


def test_an_installation_without_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="has no viscpm-tiny for chat"):
        tiny("chat")


def test_it_is_small_and_has_no_code():
    files = [path for path in embedded.FOLDER.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert sum(os.path.getsize(path) for path in weights) <= 12 * 1024**2
    # The wheel takes two levels of folders; pickles and code have no business in it.
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".jinja"}
    assert all(len(path.relative_to(embedded.FOLDER).parts) <= 3 for path in files)
