"""Original folders converted, inspected, published: what is written is the model, and complete or not there at all."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from reference import write_json
from safetensors.torch import load_file
from sibling_folders import NAMES
from transformers import AutoModelForImageTextToText, AutoProcessor

from viscpm_hf import OriginalCheckpointError, convert
from viscpm_hf.checkpoints.errors import ConversionError
from viscpm_hf.checkpoints.tensor_files import SafetensorsWriter
from viscpm_hf.cli import main
from viscpm_hf.conversion.inspect import inspect
from viscpm_hf.conversion.publish import publish
from viscpm_hf.conversion.quantized import convert_quantized


SYSTEM_NAMES = dict(zip(NAMES, ("OmniLMM-12B", "MiniCPM-V 1.0", "MiniCPM-V 2.0", "VisualCLA-7B"), strict=True))
LICENCES = dict(zip(NAMES, ("General Model", "General Model", "MiniCPM Model License", "research only"), strict=True))

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


@pytest.fixture(scope="module")
def converted(whole_folders, tmp_path_factory) -> dict[str, Path]:
    """All four in shards, verified."""
    root = tmp_path_factory.mktemp("converted")
    for name, folder in whole_folders.items():
        report = convert(folder, root / name, max_shard_size="2MB", verify=True).verification
        assert report.num_tensors > 0 and not report.differing
        # VisualCLA's file of integers beside the weights keeps it from being run for the comparison.
        assert report.loading.is_output_equal is (None if name == "visualcla" else True)
    return {name: root / name for name in NAMES}


def test_folders_run_without_the_package(converted, whole_folders, tmp_path):
    """Converted ones, and what `save_pretrained` writes: they carry their code."""
    folders = {}
    for name, original in whole_folders.items():
        folders[name] = [
            Path(shutil.copytree(converted[name], tmp_path / "converted" / name)),
            tmp_path / "saved" / name,
        ]
        AutoModelForImageTextToText.from_pretrained(original).save_pretrained(folders[name][1])
        AutoProcessor.from_pretrained(original).save_pretrained(folders[name][1])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *(str(folder) for own in folders.values() for folder in own)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, own in folders.items():
        expected = local_outputs(whole_folders[name])
        for folder in own:
            remote = load_file(folder / "outputs.safetensors")
            torch.testing.assert_close(remote["logits"], expected["logits"], atol=1e-6, rtol=0)
            assert torch.equal(remote["sequence"], expected["sequence"])


@pytest.mark.parametrize("name", NAMES)
def test_processor_and_configuration_are_the_originals(converted, whole_folders, name):
    before, after = (AutoProcessor.from_pretrained(folders[name]) for folders in (whole_folders, converted))
    assert type(after) is type(before)
    assert after.tokenizer.encode("<image>图片 what\n") == before.tokenizer.encode("<image>图片 what\n")
    said = after.image_processor.to_dict()
    assert said.pop("auto_map") and said == before.image_processor.to_dict()
    manifest = json.loads((converted[name] / "conversion.json").read_text("utf-8"))
    original = json.loads((whole_folders[name] / "config.json").read_text("utf-8"))
    assert manifest["original_configs"]["config.json"] == original
    assert manifest["command"] == f"viscpm-hf convert {whole_folders[name].name} {name}"


def test_dropped_tensors_have_reasons_and_are_kept(converted):
    manifest = json.loads((converted["visualcla"] / "conversion.json").read_text("utf-8"))
    dropped = {entry["source"]: entry for entry in manifest["dropped"]}
    assert "visual_resampler.pooler.dense.weight" in dropped
    assert "vision_model.vision_model.embeddings.position_ids" in dropped
    assert all(entry["reason"] != "unknown" for entry in dropped.values())
    assert set(load_file(converted["visualcla"] / "original_extras.safetensors")) == set(dropped)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["original", "converted"])
def test_inspect_names_system_sizes_and_licence(converted, whole_folders, name, layout, capsys):
    folder = (whole_folders if layout == "original" else converted)[name]
    found = inspect(folder)
    assert found.is_complete and found.problems == [] and found.surplus == []
    assert found.system == SYSTEM_NAMES[name] and LICENCES[name] in found.licence
    assert found.dtypes.keys() <= {"float32", "int64"} and set(found.parameters) == {
        "language model", "vision tower", "resampler",
    }  # fmt: skip
    assert found.sizes["queries"] == 4 and found.sizes["resolution"] == (70 if "minicpmv" in name else 56)
    assert main(["inspect", str(folder)]) == 0
    assert SYSTEM_NAMES[name] in capsys.readouterr().out


def test_inspect_names_missing_and_unknown_tensors(whole_folders, tmp_path):
    folder = Path(shutil.copytree(whole_folders["minicpmv-2.0"], tmp_path / "broken"))
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    tensors = {}
    for file in set(index["weight_map"].values()):
        tensors |= load_file(folder / file)
        (folder / file).unlink()
    (folder / "model.safetensors.index.json").unlink()
    tensors["vpm.strange"] = tensors.pop("vpm.norm.bias")
    torch.save(tensors, folder / "pytorch_model.bin")
    found = inspect(folder)
    assert found.missing == ["vision_tower.post_layernorm.bias"] and found.surplus == ["vpm.strange"]
    assert not found.is_complete and not found.is_sharded
    with pytest.raises(OriginalCheckpointError, match="1 unknown tensors"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("command", [["convert", "FOLDER", "OUT"], ["inspect", "FOLDER"]])
def test_later_minicpmv_is_refused_by_name(tmp_path, command, capsys):
    write_json(
        tmp_path / "config.json",
        {"model_type": "minicpmv", "version": 2.6, "vision_config": {}, "hidden_size": 3584, "query_num": 64},
    )
    paths = {"FOLDER": str(tmp_path), "OUT": str(tmp_path.parent / "never")}
    assert main([paths.get(word, word) for word in command]) == 1
    error = capsys.readouterr().err
    assert "MiniCPM-V 2.6" in error and "trust_remote_code" in error and error.count("\n") == 1


def test_quantized_folder_answers(whole_folders, tmp_path):
    folder = tmp_path / "int8"
    result = convert_quantized(whole_folders["minicpmv-2.0"], folder, "8bit")
    positions = 4 * 256  # stored, but no parameter
    assert result.num_parameters == inspect(whole_folders["minicpmv-2.0"]).num_parameters - positions
    found = inspect(folder)
    assert found.quantization and found.system == "MiniCPM-V 2.0" and not found.missing
    model = AutoModelForImageTextToText.from_pretrained(folder)
    layer = model.language_model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Int8Linear"
    assert type(model.resampler.attn.q_proj) is torch.nn.Linear
    assert AutoProcessor.from_pretrained(folder).num_query_tokens == 4


def test_interrupted_conversion_goes_on(whole_folders, tmp_path, monkeypatch):
    """The disk is full after two files; what is finished is used again."""
    stock, written = SafetensorsWriter.finish, []

    def finish(writer):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(writer.path.name)
        return stock(writer)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="--resume"):
        patch.setattr(SafetensorsWriter, "finish", finish)
        convert(whole_folders["omnilmm"], out, max_shard_size="1MB")
    assert not out.exists()
    assert convert(whole_folders["omnilmm"], out, max_shard_size="1MB", resume=True).num_resumed_files == 2
    AutoModelForImageTextToText.from_pretrained(out)


@pytest.mark.parametrize("name", NAMES)
def test_card_and_publishing(converted, name):
    publication = publish(converted[name], "someone/copy", dry_run=True)
    assert {"README.md", "config.json", "modeling_vision_resampler.py", "conversion.json"} <= set(publication.files)
    card = (converted[name] / "README.md").read_text("utf-8")
    assert SYSTEM_NAMES[name] in card and LICENCES[name] in card and "2308.12038" not in card
    assert f"viscpm-hf convert {converted[name].name}" in card


def original_contents(folder: Path) -> dict[str, dict]:
    """All files of an original folder but the tokenizer's model and our manifest: tensors, or JSON."""
    contents = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.suffix in (".bin", ".safetensors"):
            contents[name] = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        elif path.suffix == ".json" and name != "conversion.json":
            contents[name] = json.loads(path.read_text("utf-8"))
    return contents


@pytest.mark.parametrize("name", NAMES)
def test_original_is_had_back_to_the_bit(name, converted, whole_folders, tmp_path):
    """File by file, each with its own tensors, names and configuration; VisualCLA's are three."""
    source, folder = whole_folders[name], converted[name]
    back = tmp_path / "back"
    convert(folder, back, to="original", verify=True)
    before, after = original_contents(source), original_contents(back)
    assert after.keys() == before.keys()
    for file, content in before.items():
        if not file.endswith((".bin", ".safetensors")):
            assert after[file] == content, file
            continue
        assert after[file].keys() == content.keys()
        for key, tensor in content.items():
            assert after[file][key].dtype == tensor.dtype and torch.equal(after[file][key], tensor), key
    assert AutoProcessor.from_pretrained(back).tokenizer.get_vocab()


def test_a_folder_that_no_conversion_wrote_has_no_way_back(converted, tmp_path):
    folder = Path(shutil.copytree(converted["omnilmm"], tmp_path / "saved"))
    (folder / "conversion.json").unlink()
    with pytest.raises(ConversionError, match="has no conversion.json"):
        convert(folder, tmp_path / "never", to="original")
