"""VisualCLA's adapter and its bases as one folder, and the adapter in two halves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from reference import LORA_ALPHA, LORA_RANK, VisualClaRelease, write_json, write_visualcla_release
from safetensors.torch import load_file, save_file
from sibling_folders import make_system, write_tokenizer
from sibling_inputs import model_inputs, sample
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from viscpm_hf import OriginalCheckpointError, convert
from viscpm_hf.chat import visualcla
from viscpm_hf.cli import main
from viscpm_hf.conversion.inspect import inspect
from viscpm_hf.conversion.visualcla_merge import MergedTensors, merge_visualcla, open_release


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> VisualClaRelease:
    """Bases in half precision, as they are published, and a tokenizer."""
    release = write_visualcla_release(make_system("visualcla"), tmp_path_factory.mktemp("release"))
    write_tokenizer("visualcla", release.adapter)
    for file in release.text_model.glob("*.bin"):
        torch.save({name: tensor.half() for name, tensor in torch.load(file, weights_only=True).items()}, file)
    return release


def bases(release: VisualClaRelease) -> dict[str, torch.Tensor]:
    """Both bases by the names of the whole model."""
    tensors = {f"vision_model.{k}": v for k, v in load_file(release.vision_model / "model.safetensors").items()}
    for file in release.text_model.glob("*.bin"):
        tensors |= {f"text_model.{name}": tensor for name, tensor in torch.load(file, weights_only=True).items()}
    return tensors


def merge(release: VisualClaRelease, output: Path, lora_model=None, **options):
    return merge_visualcla(release.text_model, release.vision_model, lora_model or release.adapter, output, **options)


@pytest.fixture(scope="module")
def merged(release, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "visualcla"
    arguments = ["--text-model", str(release.text_model), "--vision-model", str(release.vision_model)]
    arguments += ["--lora-model", str(release.adapter), "--max-shard-size", "1MB", "--verify", str(folder)]
    assert main(["merge", "visualcla", *arguments]) == 0
    return folder


def merged_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return tensors


def change(adapter: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """alpha / r · B · A, apart from the code under test."""
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    return LORA_ALPHA / LORA_RANK * torch.einsum("or,ri->oi", b, a)


def test_matrices_are_base_plus_change(release, merged):
    before, after = bases(release), merged_tensors(merged)
    adapter = torch.load(release.adapter / "adapter_model.bin", weights_only=True)
    for original, ours in (
        ("text_model.model.layers.1.mlp.down_proj", "language_model.model.layers.1.mlp.down_proj"),
        ("text_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"),
        (
            "vision_model.vision_model.encoder.layers.1.self_attn.v_proj",
            "vision_tower.encoder.layers.1.self_attn.v_proj",
        ),
    ):
        expected = before[f"{original}.weight"].double() + change(adapter, original)
        assert after[f"{ours}.weight"].dtype == torch.float16
        # Computed in fp32 and rounded once: what fp64 gives, rounded, but for its ties.
        torch.testing.assert_close(after[f"{ours}.weight"].double(), expected, atol=1e-6, rtol=2**-11)
    untouched = "model.layers.0.input_layernorm.weight"
    assert torch.equal(after[f"language_model.{untouched}"], before[f"text_model.{untouched}"])


def test_embeddings_are_replaced_and_the_vocabulary_is_theirs(release, merged):
    adapter, after = torch.load(release.adapter / "adapter_model.bin", weights_only=True), merged_tensors(merged)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        own = adapter[f"base_model.model.text_model.{name}"]
        assert torch.equal(after[f"language_model.{name}"], own.half())
    assert json.loads((release.text_model / "config.json").read_text())["vocab_size"] == len(own) - 4
    assert json.loads((merged / "config.json").read_text())["text_config"]["vocab_size"] == len(own)


@torch.no_grad()
def test_merged_folder_is_base_plus_adapter_at_run_time(tmp_path):
    """Where nothing is rounded; `test_matrices_are_base_plus_change` is about what is."""
    system = make_system("visualcla")
    release = write_visualcla_release(system, tmp_path / "release")
    write_tokenizer("visualcla", release.adapter)
    merge(release, tmp_path / "merged", dtype="float32")
    prompt = sample(system, 1)
    inputs, logits = model_inputs([prompt]), []
    for folder, given in (
        (tmp_path / "merged", {}),
        (release.adapter, {"text_model": release.text_model, "vision_model": release.vision_model}),
    ):
        model = AutoModelForImageTextToText.from_pretrained(folder, **given).eval()
        logits.append(model(**inputs).logits[0])
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(logits[0], system.logits(prompt.ids, prompt.views), atol=1e-5, rtol=0)


def test_merged_folder_chats(merged):
    model, tokenizer, _ = visualcla.get_model_and_tokenizer_and_processor(merged, torch_dtype=torch.float32)
    answer, history = visualcla.chat(model, None, "你好", generation_config={"max_new_tokens": 3})
    assert isinstance(answer, str) and len(history) == 2
    assert inspect(merged).is_complete and inspect(merged).system == "VisualCLA-7B"


def test_several_adapters_one_after_the_other(release, tmp_path):
    """The second one changes matrices alone, with another rank."""
    second = tmp_path / "second"
    shutil.copytree(release.adapter, second)
    name = "text_model.model.layers.0.mlp.up_proj"
    a, b = torch.randn(2, 256), torch.randn(96, 2)
    save_file(
        {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b},
        second / "adapter_model.safetensors",
    )
    (second / "adapter_model.bin").unlink()
    config = json.loads((second / "adapter_config.json").read_text())
    write_json(second / "adapter_config.json", config | {"r": 2, "lora_alpha": 1})
    first = torch.load(release.adapter / "adapter_model.bin", weights_only=True)
    merge(release, tmp_path / "out", f"{release.adapter},{second}", dtype="float32")
    expected = bases(release)[f"{name}.weight"].double() + change(first, name) + 0.5 * (b.double() @ a.double())
    after = merged_tensors(tmp_path / "out")["language_model.model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(after.double(), expected, atol=1e-5, rtol=0)
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text("utf-8"))
    assert {"lora_model/adapter_model.bin", "lora_model_2/adapter_model.safetensors"} <= set(manifest["other_sources"])


def test_matrices_are_computed_one_at_a_time(release, monkeypatch, tmp_path):
    """Planning computes none, and writing asks for each once."""
    asked = []
    stock = MergedTensors.__getitem__
    monkeypatch.setattr(MergedTensors, "__getitem__", lambda self, name: asked.append(name) or stock(self, name))
    checkpoint, _ = open_release(release.text_model, release.vision_model, [str(release.adapter)])
    assert asked == []
    merge(release, tmp_path / "out")
    assert sorted(asked) == sorted(checkpoint.specs())


@pytest.mark.parametrize("given", ["none", "text_model", "vision_model"])
def test_missing_bases_are_named(release, tmp_path, given, capsys):
    arguments = ["--lora-model", str(release.adapter), str(tmp_path / "out")]
    if given != "none":
        arguments += [f"--{given.replace('_', '-')}", str(getattr(release, given))]
    assert main(["merge", "visualcla", *arguments]) == 1
    error = capsys.readouterr().err
    assert ("text_model (Chinese" in error) == (given != "text_model")
    assert ("vision_model (openai" in error) == (given != "vision_model")
    assert list(tmp_path.iterdir()) == []


def test_adapter_alone_is_inspected_and_not_converted(release, tmp_path, capsys):
    found = inspect(release.adapter)
    assert found.system == "VisualCLA-7B" and not found.is_complete
    assert [name.partition(" ")[0] for name in found.missing] == ["text_model", "vision_model"]
    assert found.next_command.startswith("viscpm-hf merge visualcla --text-model")
    assert main(["convert", str(release.adapter), str(tmp_path / "out")]) == 1
    assert "viscpm-hf merge visualcla" in capsys.readouterr().err


def test_wrong_base_leaves_nothing(release, tmp_path):
    with pytest.raises(OriginalCheckpointError, match="bases don't have|another model"):
        merge_visualcla(release.text_model, release.text_model, release.adapter, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no folder"):
        merge_visualcla(release.text_model, tmp_path / "nowhere", release.adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- text-generation-webui


@pytest.fixture(scope="module")
def halves(release, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("split") / "out"
    arguments = ["--to", "text-generation-webui", "--lora-model", str(release.adapter), str(folder)]
    assert main(["merge", "visualcla", *arguments]) == 0
    return folder / "adapter_text_lora_model_tgwebui", folder / "adapter_vision_lora_model_tgwebui"


@torch.no_grad()
def test_text_half_is_an_adapter_of_the_language_model(release, merged, halves):
    from peft import PeftModel

    base = LlamaForCausalLM.from_pretrained(release.text_model, dtype="float32")
    base.resize_token_embeddings(base.config.vocab_size + 4, mean_resizing=False)
    adapted = PeftModel.from_pretrained(base, halves[0]).eval()
    whole = AutoModelForImageTextToText.from_pretrained(merged, dtype="float32").language_model.eval()
    assert isinstance(adapted.config, LlamaConfig)
    ids = torch.arange(5, 25)[None]
    # The merged folder is rounded to half precision.
    torch.testing.assert_close(adapted(ids).logits, whole(ids).logits, atol=2e-2, rtol=0)
    assert (halves[0] / "tokenizer.model").is_file()


def test_vision_half_has_the_rest(release, halves):
    adapter = torch.load(release.adapter / "adapter_model.bin", weights_only=True)
    tensors = torch.load(halves[1] / "adapter_model.bin", weights_only=True)
    name = "encoder.layers.0.self_attn.q_proj.lora_A.weight"
    source = f"base_model.model.vision_model.vision_model.{name}"
    assert torch.equal(tensors[f"base_model.model.vision_model.{name}"], adapter[source])
    own = torch.load(halves[1] / "visual_resampler_model.bin", weights_only=True) | torch.load(
        halves[1] / "image_projection_layer_model.bin", weights_only=True
    )
    assert torch.equal(own["weight"], adapter["base_model.model.image_projection_layer.weight"])
    assert json.loads((halves[1] / "visual_resampler_config.json").read_text())["num_query_tokens"] == 4
    # Nothing of the release is lost.
    text = torch.load(halves[0] / "adapter_model.bin", weights_only=True)
    assert len(text) + len(tensors) + len(own) == len(adapter)


def test_split_takes_the_adapter_alone(release, tmp_path, capsys):
    arguments = ["--to", "text-generation-webui", "--lora-model", str(release.adapter), str(tmp_path / "out")]
    assert main(["merge", "visualcla", *arguments, "--verify", "--text-model", "x"]) == 1
    assert "leave out --text-model, --verify" in capsys.readouterr().err


def test_a_merged_folder_goes_back_to_one_original_file(merged, tmp_path):
    """The adapter's own file can't be had back, but the whole model can in its layout."""
    convert(merged, tmp_path / "back", to="original")
    assert {path.name for path in (tmp_path / "back").glob("*.bin")} == {"pytorch_model.bin"}
    loaded, again = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (merged, tmp_path / "back")
    )
    assert all(torch.equal(again[name], tensor) for name, tensor in loaded.items()) and again.keys() == loaded.keys()
