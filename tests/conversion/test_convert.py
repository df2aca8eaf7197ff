"""Conversion there and back: same values, same outputs; atomic, resumable, in little memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import CHAT_CASES, CPM_BEE_LAYOUTS, GOLDEN, PRUNED_CASE, Golden, reference_options
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import viscpm_hf
import viscpm_hf.conversion.convert as convert_module
from viscpm_hf import ConversionError, VisCPMChat, convert, inspect
from viscpm_hf.checkpoints.tensor_files import ArchiveWriter, TensorSpec
from viscpm_hf.checkpoints.weight_transforms import KeyMatcher
from viscpm_hf.conversion.convert import parse_dtype, parse_size
from viscpm_hf.conversion.quantized import convert_quantized
from viscpm_hf.families import key_maps
from viscpm_hf.modeling.generation_cpm_bee import HUB_GENERATION_KEYS


PAINT = GOLDEN / "paint_a"


def weights_of(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob(f"{name}*.safetensors") for key, value in load_file(file).items()}


def ulps(before: torch.Tensor, after: torch.Tensor) -> int:
    """By how many representable numbers two tensors of one dtype differ at most."""
    kind = {2: torch.int16, 4: torch.int32}[before.element_size()]
    ordered = []
    for tensor in (before, after):
        bits = tensor.contiguous().view(kind).long()
        lowest = torch.iinfo(kind).min
        ordered.append(torch.where(bits < 0, lowest - bits, bits))
    return int((ordered[0] - ordered[1]).abs().max())


# ------------------------------------------------------------------------------------------------------ same results


def test_converted_is_loaded_directly(golden, converted, chat):
    direct = chat.model.state_dict()
    stored = weights_of(converted)
    assert set(direct) - set(stored) == {"lm_head.weight"}
    for name, tensor in stored.items():
        assert torch.equal(tensor, direct[name]), name
    model = AutoModelForImageTextToText.from_pretrained(converted)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, direct[name]), name


def test_converted_answers_as_the_reference(golden, converted):
    chat = VisCPMChat(converted, device="cpu")
    case = golden.expected["answers"][0]
    turn = case["turns"][0]
    image = golden.folder / case["image"] if isinstance(case["image"], str) else golden.image(case["image"])
    answer, _, _ = chat.chat(image, turn["question"], **reference_options(case["generate"]))
    assert answer == turn["answer"].replace("<<", "<")


def test_folder_is_complete(golden, converted):
    names = {path.name for path in converted.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "tokenizer_config.json", "vocab.txt", "processor_config.json",
        "chat_template.jinja", "README.md", "conversion.json", "model.safetensors.index.json",
        "modeling_viscpm_chat.py",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    assert (converted / "vocab.txt").read_bytes() == golden.vocab.read_bytes()
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights_of(converted).keys()
    assert len(set(index["weight_map"].values())) >= 3
    assert list(converted.parent.iterdir()) == [converted], "nothing is left beside it"


def test_manifest_accounts_for_every_tensor(golden, converted):
    manifest = json.loads((converted / "conversion.json").read_text("utf-8"))
    state_dict = golden.state_dict()
    entries = manifest["tensors"] + manifest["dropped"]
    assert sorted(entry["source"] for entry in entries) == sorted(state_dict)
    matcher = KeyMatcher(key_maps.CHAT)
    for entry in manifest["tensors"]:
        target, expected = matcher.match(entry["source"])
        assert (entry["target"], entry["operation"]) == (target, expected.operation)
    assert all(entry["reason"] for entry in manifest["dropped"])
    assert len(manifest["source"]["sha256"]) == 64


def test_card_is_bilingual_and_names_the_source(golden, converted):
    manifest = json.loads((converted / "conversion.json").read_text("utf-8"))
    card = (converted / "README.md").read_text("utf-8")
    for text in (manifest["source"]["sha256"], manifest["command"], "licence", "许可证", "base_model: openbmb/VisCPM"):
        assert text in card


# Of cpm-bee-2b; that of -10b has another `pad_token_id`, which is a space.
HUB_GENERATION = {
    "num_beams": 3, "num_beam_groups": 1, "do_sample": False, "is_constraint_gen_mode": False,
    "is_contrastive_search_gen_mode": False, "pad_token_id": 5, "eos_token_id": 7, "bos_token_id": 6,
    "max_length": 100, "vocab_size": 86583,
}  # fmt: skip


@pytest.mark.parametrize("case", [*CHAT_CASES, PRUNED_CASE])
def test_cpm_bee_with_the_hubs_generation_config(case, tmp_path, caplog):
    """Kept on the way to us and back; what has no meaning goes quietly."""
    source = Golden(case).write_layout(tmp_path / "original", "cpm-bee in Hub spelling")
    (source / "generation_config.json").write_text(json.dumps(HUB_GENERATION), "utf-8")
    convert(source, tmp_path / "out")
    convert_quantized(source, tmp_path / "int8", "8bit")
    for folder in (source, tmp_path / "out", tmp_path / "int8"):
        loaded = AutoModelForCausalLM.from_pretrained(folder).generation_config
        assert (loaded.num_beams, loaded.max_length, loaded.max_new_tokens) == (3, 100, None), folder
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (6, 7, 0), folder
        assert not HUB_GENERATION.keys() - {*vars(loaded), *HUB_GENERATION_KEYS}
        assert not any(hasattr(loaded, name) for name in HUB_GENERATION_KEYS)
    convert(tmp_path / "out", tmp_path / "back", to="original")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text("utf-8")) == HUB_GENERATION
    assert not [record for record in caplog.records if "generation" in record.getMessage()]


@pytest.mark.parametrize("way", CPM_BEE_LAYOUTS)
def test_pruned_there_and_back(tmp_path, way):
    golden = Golden(PRUNED_CASE)
    source = golden.write_layout(tmp_path / "original", way)
    assert inspect(source).is_complete
    result = convert(source, tmp_path / "out", verify=True, max_shard_size="50KB")
    assert result.verification.loading.is_output_equal and len(result.files) > 1
    model, tokenizer = (
        loader.from_pretrained(tmp_path / "out", **options)
        for loader, options in ((AutoModelForCausalLM, {"dtype": torch.float32}), (AutoTokenizer, {}))
    )
    assert model.config.mask_modules == golden.llm_config["mask_modules"]
    case = golden.expected["documents"][0]
    filled = model.fill(case["documents"], tokenizer, **reference_options(case["generate"]))
    assert [document["<ans>"] for document in filled] == case["results"]
    convert(tmp_path / "out", tmp_path / "back", to="original", verify=True)
    before, after = golden.state_dict(), torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert before.keys() == after.keys()
    configs = [json.loads((folder / "config.json").read_text("utf-8")) for folder in (source, tmp_path / "back")]
    assert configs[0]["mask_modules"] == configs[1]["mask_modules"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({(0, 0): True}, r"unknown tensors \(encoder\.layers\.0\.self_att"),
        ({(1, 0): False}, r"tensors missing \(model\.layers\.1\.input_layernorm"),
        ({(5, 1): False}, r"tensors missing \(model\.layers\.5\.post_attention_layernorm"),
        (None, "tensors missing"),
        ([], "mask_modules has entries for 0 layers, but num_hidden_layers is 6"),
    ],
)
def test_a_pruned_file_and_another_pattern_is_one_clear_error(tmp_path, change, complaint):
    source = Golden(PRUNED_CASE).write_layout(tmp_path / "original", "cpm-bee")
    config = json.loads((source / "config.json").read_text("utf-8"))
    if isinstance(change, dict):
        (((layer, block), missing),) = change.items()
        config["mask_modules"][layer][block] = missing
    else:
        config["mask_modules"] = change
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=complaint):
        AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(ValueError, match=complaint):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("way", ["cpm-bee", "cpm-bee with bare names"])
def test_cpm_bee_alone(golden, tmp_path, way):
    source = golden.write_layout(tmp_path / "original", way)
    direct = AutoModelForCausalLM.from_pretrained(source)
    result = convert(source, tmp_path / "out", verify=True)
    assert result.kind == "cpm_bee" and result.verification.loading.is_output_equal
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_paint(converted_paint):
    pipelines = [viscpm_hf.VisCPMPaintPipeline.from_pretrained(folder) for folder in (PAINT, converted_paint)]
    images = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline("一只猫", num_inference_steps=2, generator=generator, output_type="pt").images)
    assert torch.equal(*images)


# --------------------------------------------------------------------------------------------------- there and back


def test_back_within_one_rounding(golden, converted, tmp_path):
    convert(converted, tmp_path / "back", to="original", verify=True)
    before, after = golden.state_dict(), torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert ulps(tensor, after[name]) <= 1, name
    model = VisCPMChat(tmp_path / "back", device="cpu").model
    assert (
        model.config.to_dict()["text_config"]
        == VisCPMChat(golden.weights, device="cpu").model.config.to_dict()["text_config"]
    )


def test_half_through_single_comes_back_exactly(half_golden, tmp_path):
    convert(half_golden, tmp_path / "single", dtype="float32")
    assert {tensor.dtype for tensor in weights_of(tmp_path / "single").values()} == {torch.float32}
    convert(tmp_path / "single", tmp_path / "back", to="original")
    before = torch.load(half_golden / "pytorch_model.bin", weights_only=True)
    after = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.float16 and torch.equal(tensor, after[name]), name


def test_half_kept_comes_back_within_one_rounding(half_golden, tmp_path):
    convert(half_golden, tmp_path / "half", verify=True)
    convert(tmp_path / "half", tmp_path / "back", to="original")
    before = torch.load(half_golden / "pytorch_model.bin", weights_only=True)
    after = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    for name, tensor in before.items():
        normal = tensor.abs() * tensor.shape[-1] ** -0.5 >= torch.finfo(torch.float16).tiny
        assert ulps(tensor[normal], after[name][normal]) <= 1 if normal.any() else True, name
    manifest = json.loads((tmp_path / "half" / "conversion.json").read_text("utf-8"))
    assert "one rounding to float16" in manifest["rounding"]


def test_paint_back(converted_paint, tmp_path):
    convert(converted_paint, tmp_path / "back", to="original", verify=True)
    before = torch.load(PAINT / "pytorch_model.bin", weights_only=True)
    after = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert before.keys() == after.keys()
    assert all(ulps(tensor, after[name]) <= 1 for name, tensor in before.items())
    viscpm_hf.VisCPMPaintPipeline.from_pretrained(tmp_path / "back")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrower_dtype(golden, tmp_path, dtype):
    result = convert(golden.weights, tmp_path / "out", dtype=dtype, verify=True)
    assert result.verification.loading.is_output_equal is None, "the source is folded in its own dtype"
    assert {str(tensor.dtype) for tensor in weights_of(tmp_path / "out").values()} == {f"torch.{dtype}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_converted_again_is_refused_politely(converted, tmp_path):
    result = convert(converted, tmp_path / "again")
    assert result.already_converted and "converted folder already" in result.notes[0]
    assert not (tmp_path / "again").exists()


def test_original_to_original_is_an_error(golden, tmp_path):
    with pytest.raises(ConversionError, match="original's format already"):
        convert(golden.weights, tmp_path / "out", to="original")


# ------------------------------------------------------------------------------------------------- options, planning


def test_dry_run_writes_nothing(golden, tmp_path):
    result = convert(golden.weights, tmp_path / "out", dry_run=True, max_shard_size="200KB")
    assert result.is_dry_run and len(result.files) > 2 and result.num_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_sizes_and_dtypes():
    assert parse_size("5GB") == 5 * 10**9 and parse_size("1.5 gib") == 3 * 2**29 and parse_size(7) == 7
    for wrong in ("five", "-1GB", "0", "nan", ""):
        with pytest.raises(ValueError, match="shard size"):
            parse_size(wrong)
    assert parse_dtype("keep") is None and parse_dtype(torch.bfloat16) is torch.bfloat16
    with pytest.raises(ValueError, match="float32, float16, bfloat16, keep"):
        parse_dtype("int8")


def test_shards_hold_what_they_may(golden, tmp_path):
    limit = 100_000
    result = convert(golden.weights, tmp_path / "out", max_shard_size=limit)
    for name in result.files:
        if name.startswith("model-"):
            file = load_file(tmp_path / "out" / name)
            size = sum(tensor.nbytes for tensor in file.values())
            assert size <= limit or len(file) == 1
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    AutoProcessor.from_pretrained(tmp_path / "out")


# ---------------------------------------------------------------------------------------------- atomic and resumable

KILLED_AFTER_FIRST = """
import os, signal, sys
from viscpm_hf import convert
from viscpm_hf.conversion.workspace import Workspace
finished = Workspace.file_finished
def then_die(self, file, size, digest):
    finished(self, file, size, digest)
    if len(self.finished) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
Workspace.file_finished = then_die
convert(sys.argv[1], sys.argv[2], max_shard_size="200KB")
"""


def kill_during(source: Path, output: Path, finished_files: int) -> None:
    """A conversion that is killed once it has finished a number of files."""
    command = [sys.executable, "-c", KILLED_AFTER_FIRST, source, output, str(finished_files)]
    assert subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL


def test_resume_after_sigkill(golden, tmp_path, monkeypatch):
    output = tmp_path / "out"
    kill_during(golden.weights, output, 2)
    partial = tmp_path / "out.partial"
    assert not output.exists() and partial.is_dir()
    with pytest.raises(ConversionError, match="--resume"):
        convert(golden.weights, output, max_shard_size="200KB")
    with pytest.raises(ConversionError, match="something else.*files"):
        convert(golden.weights, output, max_shard_size="300KB", resume=True)
    first = sorted(partial.glob("model-00001*"))[0]
    written = first.stat().st_mtime_ns
    result = convert(golden.weights, output, max_shard_size="200KB", resume=True, verify=True)
    assert result.num_resumed_files == 2
    assert (output / first.name).stat().st_mtime_ns == written, "a finished file isn't written again"
    assert sorted(tmp_path.iterdir()) == [output]


def test_resume_writes_spoilt_files_again(golden, tmp_path):
    output = tmp_path / "out"
    kill_during(golden.weights, output, 2)
    spoilt = next((tmp_path / "out.partial").glob("model-00001*"))
    with spoilt.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    result = convert(golden.weights, output, max_shard_size="200KB", resume=True, verify=True)
    assert result.num_resumed_files == 1


def test_resume_of_what_is_finished(golden, converted):
    size = golden.weights.stat().st_size // 3
    result = convert(golden.weights, converted, max_shard_size=size, resume=True)
    assert result.already_converted and "finished already" in result.notes[0]


def test_resume_of_something_else_is_no_success(golden, converted):
    size = golden.weights.stat().st_size // 3
    for other in ({"dtype": "bfloat16"}, {"max_shard_size": size * 4}):
        with pytest.raises(ConversionError, match="--overwrite"):
            convert(golden.weights, converted, **{"max_shard_size": size, **other}, resume=True)


@pytest.mark.parametrize("output", ["", ".", "sub/.."])
def test_output_needs_a_name(golden, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match="no name for a new folder"):
        convert(golden.weights, output)
    assert not list(tmp_path.iterdir())


def test_resume_without_a_beginning_begins(golden, tmp_path):
    result = convert(golden.weights, tmp_path / "out", resume=True)
    assert result.num_resumed_files == 0 and (tmp_path / "out" / "config.json").is_file()


def test_ctrl_c_leaves_nothing_under_the_name(golden, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "converted_pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(golden.weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import resource, sys
from viscpm_hf.cli import main
import viscpm_hf.conversion.convert
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
sys.exit(main(["convert", sys.argv[1], sys.argv[2]]))
"""


def test_no_room_for_a_file(golden, tmp_path):
    """A limit on the size of files stands for a full disk: every system has it, and nothing else is harmed."""
    command = [sys.executable, "-c", FULL_DISK, golden.weights, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr and "--resume" in done.stderr and "GB are free" in done.stderr
    assert not (tmp_path / "out").exists()
    convert(golden.weights, tmp_path / "out", resume=True, verify=True)


def test_too_little_space_is_known_before(golden, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="0.00 GB free.*needs another"):
        convert(golden.weights, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_existing_output(golden, tmp_path, converted):
    output = tmp_path / "out"
    (output / "sub").mkdir(parents=True)
    (output / "precious.txt").write_text("keep me")
    for overwrite in (False, True):
        with pytest.raises(ConversionError, match="overwrite"):
            convert(golden.weights, output, overwrite=overwrite)
    assert (output / "precious.txt").read_text() == "keep me"
    shutil.rmtree(output)
    shutil.copytree(converted, output)
    (output / "old").write_text("")
    convert(golden.weights, output, overwrite=True)
    assert not (output / "old").exists() and (output / "config.json").is_file()
    assert list(tmp_path.iterdir()) == [output]


def test_output_may_be_an_empty_folder(golden, tmp_path):
    (tmp_path / "out").mkdir()
    convert(golden.weights, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_output_inside_source(golden, original_folder):
    with pytest.raises(ConversionError, match="inside the source"):
        convert(original_folder, original_folder / "out")
    with pytest.raises(ConversionError, match="inside"):
        convert(original_folder / "pytorch_model.bin", original_folder, overwrite=True)
    assert not (original_folder / "out").exists()


def test_output_is_a_file(golden, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConversionError, match="no folder"):
        convert(golden.weights, tmp_path / "out", overwrite=True)


# ----------------------------------------------------------------------------------------------------------- memory

MEMORY = """
import json, sys, threading, time
from viscpm_hf import convert
import viscpm_hf.conversion.convert
from viscpm_hf.modeling.modeling_cpm_bee import CpmBeeForCausalLM
peak = 0
def anonymous():
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
base = anonymous()
threading.Thread(target=watch, daemon=True).start()
convert(sys.argv[1], sys.argv[2], max_shard_size="100MB")
print(json.dumps({"base": base, "peak": peak}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="RssAnon is Linux's")
def test_memory_does_not_grow_with_the_tensors(tmp_path):
    """A checkpoint of 400 MB, its embedding alone 330 MB, takes no more than some pieces of it."""
    golden = Golden("chat_a")
    source = tmp_path / "big"
    source.mkdir()
    words = golden.vocab.read_text("utf-8").rstrip("\n").split("\n")
    words[-1:-1] = [f"extra{index}" for index in range(20_000 - len(words))]
    (source / "vocab.txt").write_text("\n".join(words), "utf-8")
    hidden = 8192
    config = {**golden.llm_config, "vocab_size": len(words), "dim_model": hidden, "num_layers": 1}
    (source / "config.json").write_text(json.dumps({"model_type": "cpmbee", **config}))
    sizes = {
        "input_embedding.weight": (len(words), hidden),
        "position_bias.relative_attention_bias": (32 + 256, 4),
        "encoder.output_layernorm.weight": (hidden,),
        "encoder.layers.0.self_att.layernorm_before_attention.weight": (hidden,),
        "encoder.layers.0.ffn.layernorm_before_ffn.weight": (hidden,),
        **{f"encoder.layers.0.self_att.self_attention.project_{x}.weight": (64, hidden) for x in "qkv"},
        "encoder.layers.0.self_att.self_attention.attention_out.weight": (hidden, 64),
        **{f"encoder.layers.0.ffn.ffn.w_in.w_{x}.weight": (96, hidden) for x in "01"},
        "encoder.layers.0.ffn.ffn.w_out.weight": (hidden, 96),
    }
    specs = [TensorSpec(name, torch.float16, shape) for name, shape in sizes.items()]
    writer = ArchiveWriter(source / "pytorch_model.bin", specs)
    for spec in specs:
        writer.write(spec.name, [torch.ones(spec.shape, dtype=spec.dtype)])
    writer.finish()
    command = [sys.executable, "-c", MEMORY, source, tmp_path / "out"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    memory = json.loads(done.stdout.splitlines()[-1])
    assert memory["peak"] - memory["base"] < 120e6, memory
