"""What is said where other libraries are too old."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import viscpm_hf
from viscpm_hf.version import OLDEST, require


SOURCES = Path(viscpm_hf.__file__).parents[1]


def pretend(folder: Path, **versions: str) -> str:
    """A folder that, first on the import path, makes libraries look to be of these versions."""
    for name, version in versions.items():
        facts = folder / f"{name}-{version}.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("versions", "sentence"),
    [
        (
            {"transformers": "4.57.6"},
            "needs transformers 5.20 or newer (installed is 4.57.6): pip install --upgrade \"transformers>=5.20\"",
        ),
        (
            {"transformers": "5.19.0", "torch": "2.5.1+cpu", "diffusers": "0.9.0"},
            "needs torch 2.6 or newer (installed is 2.5.1+cpu), transformers 5.20 or newer (installed is 5.19.0), "
            "diffusers 0.42 or newer (installed is 0.9.0): "
            'pip install --upgrade "torch>=2.6" "transformers>=5.20" "diffusers>=0.42"',
        ),
    ],
    ids=["one", "all"],
)  # fmt: skip
def test_import_says_in_one_sentence_what_is_too_old(tmp_path, versions, sentence):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([pretend(tmp_path, **versions), str(SOURCES)])}
    done = subprocess.run([sys.executable, "-c", "import viscpm_hf"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: viscpm-hf {viscpm_hf.__version__} {sentence}"


@pytest.mark.parametrize("version", ["5.20", "5.20.0", "5.20.0.dev0", "5.100.1", "6.0.0rc1", "10"])
def test_new_enough(tmp_path, monkeypatch, version):
    monkeypatch.syspath_prepend(pretend(tmp_path, transformers=version))
    require(transformers="5.20", not_installed_at_all="1.0")


def test_setup_asks_for_the_same():
    lines = (SOURCES.parent / "setup.cfg").read_text("utf-8").splitlines()
    stated = [
        Requirement(line) for line in map(str.strip, lines) if re.match(r"(torch|transformers|diffusers|peft)>", line)
    ]
    lower = {(r.name, s.version) for r in stated for s in r.specifier if s.operator == ">="}
    assert lower == set(OLDEST.items())


def test_muon_needs_more_than_the_rest(tmp_path, monkeypatch):
    from viscpm_hf.training.muon import MuonWithAdamW

    monkeypatch.syspath_prepend(pretend(tmp_path, torch="2.8.0"))
    with pytest.raises(ImportError, match=r"needs torch 2\.9 or newer \(installed is 2\.8\.0\)"):
        MuonWithAdamW(None, lr=1e-3)
