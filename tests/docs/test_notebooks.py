"""The notebooks' cells run, one after the other in this process; merging with small weights of VisualCLA's form."""

import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "siblings"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def place(tmp_path, monkeypatch, request):
    """An empty folder to work in, or one with what the notebook merges."""
    if request.getfixturevalue("notebook").stem == "visualcla_merge":
        from reference import write_visualcla_release
        from sibling_folders import make_system, write_tokenizer

        (tmp_path / "release").mkdir()
        release = write_visualcla_release(make_system("visualcla"), tmp_path / "release")
        write_tokenizer("visualcla", release.adapter)
        for name, folder in {
            "chinese-alpaca-plus-7b": release.text_model,
            "clip-vit-large-patch14": release.vision_model,
            "visualcla-7b-v0.1": release.adapter,
        }.items():
            (tmp_path / name).symlink_to(folder, target_is_directory=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_cells_run(notebook, place, capsys):
    namespace: dict = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(notebook.read_text("utf-8"))["cells"]):
        if cell["cell_type"] == "code" and "install" not in cell["metadata"].get("tags", ()):
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), namespace)
    said = capsys.readouterr().out
    if notebook.stem == "fine_tuning":
        assert "before: Red." in said and "after: Blue." in said


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_are_stored_without_outputs(notebook):
    cells = [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
