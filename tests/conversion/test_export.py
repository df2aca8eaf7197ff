"""Exported folders where this package isn't installed, and where it is: the same outputs, and saved again likewise."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from support import PRUNED_CASE, Golden
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from viscpm_hf import VisCPMChatForConditionalGeneration, VisCPMChatProcessor, convert


# Runs without the package: an import of it fails, as it does where it isn't installed.
REMOTE = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "viscpm_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
try:
    import viscpm_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("viscpm_hf is installed")

import torch
from PIL import Image
from safetensors.torch import save_file
"""

CHAT = (
    REMOTE
    + """
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

folder, image, output, again = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "What is this? 这是什么？🙂"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**inputs).logits
sequence = model.generate(**inputs, max_new_tokens=8)
save_file({"logits": logits.contiguous(), "sequence": sequence}, output)
model.save_pretrained(again)
processor.save_pretrained(again)
assert type(model).__module__.startswith("transformers_modules")
"""
)

CPM_BEE = (
    REMOTE
    + """
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, output, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(input_ids=torch.arange(10)[None]).logits
save_file({"logits": logits.contiguous()}, output)
model.save_pretrained(again)
tokenizer.save_pretrained(again)
"""
)

PAINT_SCRIPT = (
    REMOTE
    + """
from diffusers import DiffusionPipeline

folder, output, again = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert type(pipeline.text_encoder).__module__.startswith("diffusers_modules")
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
images = pipeline("一只猫 a cat", num_inference_steps=2, generator=generator, output_type="pt").images
save_file({"images": images.contiguous()}, output)
pipeline.save_pretrained(again)
"""
)


def run_remote(script: str, *arguments, cache) -> None:
    """Runs a script in a process that can't import this package, with a module cache of its own."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]


def local_outputs(folder, image) -> dict[str, torch.Tensor]:
    """As `CHAT`, with the installed classes."""
    from PIL import Image

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "What is this? 这是什么？🙂"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    return {"logits": logits, "sequence": model.generate(**inputs, max_new_tokens=8)}


def assert_equal(folder, image, output) -> None:
    remote = load_file(output)
    torch.set_num_threads(1)
    for name, tensor in local_outputs(folder, image).items():
        assert torch.equal(tensor, remote[name]), name


@pytest.mark.parametrize("golden", ["chat_a"], indirect=True)
def test_chat_without_the_package(golden, converted, tmp_path):
    """Loaded by remote code, saved, loaded by the package, saved, and loaded by remote code again."""
    image, cache = golden.image(0), tmp_path / "modules"
    run_remote(CHAT, converted, image, tmp_path / "1.safetensors", tmp_path / "again", cache=cache)
    assert_equal(converted, image, tmp_path / "1.safetensors")
    assert_equal(tmp_path / "again", image, tmp_path / "1.safetensors")

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "third")
    processor = AutoProcessor.from_pretrained(tmp_path / "again")
    for _ in range(2):  # saving changes nothing of what is saved
        processor.save_pretrained(tmp_path / "third")
    run_remote(
        CHAT, tmp_path / "third", image, tmp_path / "2.safetensors", tmp_path / "fourth", cache=tmp_path / "modules 2"
    )
    assert_equal(converted, image, tmp_path / "2.safetensors")
    auto_map = json.loads((tmp_path / "fourth" / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == json.loads((converted / "config.json").read_text())["auto_map"].keys()


def test_cpm_bee_without_the_package(tmp_path):
    """Pruned layers included."""
    folder = tmp_path / "converted"
    golden = Golden(PRUNED_CASE)
    convert(golden.write_layout(tmp_path / "original", "cpm-bee"), folder)
    run_remote(CPM_BEE, folder, tmp_path / "1.safetensors", tmp_path / "again", cache=tmp_path / "modules")
    torch.set_num_threads(1)
    for place in (folder, tmp_path / "again"):
        model = AutoModelForCausalLM.from_pretrained(place).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.arange(10)[None]).logits
        assert torch.equal(logits, load_file(tmp_path / "1.safetensors")["logits"])


def test_paint_without_the_package(converted_paint, tmp_path):
    """Loaded by remote code, saved, loaded by the package, saved, and loaded by remote code again."""
    run_remote(
        PAINT_SCRIPT, converted_paint, tmp_path / "1.safetensors", tmp_path / "again", cache=tmp_path / "modules"
    )
    torch.set_num_threads(1)
    expected = load_file(tmp_path / "1.safetensors")["images"]
    for folder in (converted_paint, tmp_path / "again"):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        assert type(pipeline).__module__.startswith("viscpm_hf.")
        assert type(pipeline.text_encoder).__module__.startswith("viscpm_hf.")
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipeline("一只猫 a cat", num_inference_steps=2, generator=generator, output_type="pt").images
        assert torch.equal(images, expected)
    pipeline.save_pretrained(tmp_path / "third")
    run_remote(
        PAINT_SCRIPT, tmp_path / "third", tmp_path / "2.safetensors", tmp_path / "fourth", cache=tmp_path / "modules 2"
    )
    assert torch.equal(load_file(tmp_path / "2.safetensors")["images"], expected)


@pytest.mark.parametrize("trust", [None, True])
def test_installed_classes_win(converted, trust):
    kwargs = {} if trust is None else {"trust_remote_code": trust}
    for auto_class in (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoImageProcessor):
        loaded = auto_class.from_pretrained(converted, **kwargs)
        assert type(loaded).__module__.startswith("viscpm_hf."), auto_class
    assert type(AutoProcessor.from_pretrained(converted, **kwargs).tokenizer).__module__.startswith("viscpm_hf.")
    assert type(AutoTokenizer.from_pretrained(converted, **kwargs)).__module__.startswith("viscpm_hf.")


def test_any_saved_model_carries_its_code(chat, tmp_path):
    """Also one that was never converted."""
    chat.model.save_pretrained(tmp_path)
    chat.processor.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_viscpm_chat.py").is_file() and (tmp_path / "processing_viscpm_chat.py").is_file()
    assert VisCPMChatForConditionalGeneration.from_pretrained(tmp_path).config.auto_map
    assert VisCPMChatProcessor.from_pretrained(tmp_path)


def test_remote_code_imports_only_what_is_beside_it(converted):
    from transformers.dynamic_module_utils import get_imports, get_relative_import_files

    allowed = {"torch", "transformers", "PIL", "numpy", "huggingface_hub", *sys.stdlib_module_names}
    for file in converted.glob("*.py"):
        assert set(get_imports(file)) <= allowed, file
        assert all(os.path.isfile(needed) for needed in get_relative_import_files(file)), file
