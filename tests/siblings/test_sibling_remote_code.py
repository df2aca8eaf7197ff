"""Saved folders carry their code: they load where this package isn't installed."""

import os
import subprocess
import sys

import torch
from PIL import Image
from safetensors.torch import load_file
from sibling_folders import NAMES, write_folder
from transformers import AutoModelForImageTextToText, AutoProcessor


# Runs without the package: an import of it fails, as it does where it isn't installed.
SCRIPT = """
import sys
from pathlib import Path

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "viscpm_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

content = [{"type": "image", "image": Image.new("RGB", (120, 90), "teal")}, {"type": "text", "text": "what"}]
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        outputs = {"logits": model(**inputs).logits, "sequence": model.generate(**inputs, max_new_tokens=4)}
    save_file({name: value.contiguous() for name, value in outputs.items()}, folder / "outputs.safetensors")
    again = folder / "again"
    model.save_pretrained(again)
    processor.save_pretrained(again)
    AutoModelForImageTextToText.from_pretrained(again, trust_remote_code=True)
"""


def local_outputs(folder) -> dict[str, torch.Tensor]:
    """As `SCRIPT`, with the installed classes."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": Image.new("RGB", (120, 90), "teal")}, {"type": "text", "text": "what"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return {"logits": model(**inputs).logits, "sequence": model.generate(**inputs, max_new_tokens=4)}


def test_saved_folders_run_without_the_package(tmp_path):
    folders = []
    for name in NAMES:
        original, saved = write_folder(name, tmp_path / "original" / name), tmp_path / "saved" / name
        AutoModelForImageTextToText.from_pretrained(original).save_pretrained(saved)
        AutoProcessor.from_pretrained(original).save_pretrained(saved)
        folders.append(saved)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, saved in zip(NAMES, folders, strict=True):
        remote, expected = load_file(saved / "outputs.safetensors"), local_outputs(tmp_path / "original" / name)
        torch.testing.assert_close(remote["logits"], expected["logits"], atol=1e-6, rtol=0)
        assert torch.equal(remote["sequence"], expected["sequence"])
