"""Original folders: key maps at full size, loading, and what is wrong with bad ones."""

import json
import math
from collections import Counter

import pytest
import torch
from full_size import FULL_SIZE, minicpmv
from reference import minicpmv as small_minicpmv
from reference import omnilmm as small_omnilmm
from reference import visualcla as small_visualcla
from reference import write_json, write_visualcla_release
from safetensors.torch import load_file, save_file
from sibling_folders import write_folder
from sibling_inputs import model_inputs, sample
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)

from viscpm_hf import (
    LegacySentencePieceTokenizer,
    MiniCPMVConfig,
    MiniCPMVForConditionalGeneration,
    MiniCPMVProcessor,
    OriginalCheckpointError,
)
from viscpm_hf.checkpoints.key_matching import KeyMatcher
from viscpm_hf.checkpoints.readers import converted_tensors
from viscpm_hf.checkpoints.weight_transforms import revert_operation
from viscpm_hf.families import key_maps
from viscpm_hf.families.family import COMPOSITE_FORM, FAMILIES, Family, _answering
from viscpm_hf.loading.from_pretrained import register


KINDS = tuple(kind for kind, family in FAMILIES.items() if family.form == COMPOSITE_FORM)


# ------------------------------------------------------------------------------------------------------------ key maps


@pytest.fixture(scope="module")
def full_size_models():
    with torch.device("meta"):
        return {kind: FAMILIES[kind].model_class(FAMILIES[kind].config_class()) for kind in KINDS}


@pytest.mark.parametrize("model_type", KINDS)
def test_every_original_tensor_has_one_place_or_a_reason(model_type, full_size_models):
    matcher = KeyMatcher(FAMILIES[model_type].key_maps[0])
    targets: Counter[str] = Counter()
    for name in FULL_SIZE[model_type]():
        matches, reason = matcher.match_all(name), matcher.dropped_reason(name)
        assert reason or matches, name
        assert len({entry.source for _, entry in matches}) <= 1
        if reason is None:
            targets.update(target for target, _ in matches)
    assert set(targets.values()) == {1}
    assert set(targets) == set(full_size_models[model_type].state_dict())


@pytest.mark.parametrize("model_type", KINDS)
def test_shapes_at_full_size(model_type, full_size_models):
    original = {name: torch.empty(shape, device="meta") for name, shape in FULL_SIZE[model_type]().items()}
    shapes = {name: tensor.shape for name, tensor in converted_tensors(model_type, original).items()}
    assert shapes == {name: tensor.shape for name, tensor in full_size_models[model_type].state_dict().items()}


def test_sizes_of_the_released_checkpoints(full_size_models):
    def count(model) -> int:
        return sum(tensor.numel() for tensor in model.state_dict().values())

    assert len(minicpmv()) == 694
    assert sum(math.prod(shape) for shape in minicpmv().values()) == 3_434_965_792
    model = full_size_models["minicpmv"]
    assert count(model) == 3_434_965_792
    assert count(model.language_model) == 3_007_703_808
    assert count(model.vision_tower) == 397_747_744
    assert count(model.resampler) == 29_514_240
    model = full_size_models["omnilmm"]
    assert round(count(model) / 1e9, 2) == 11.61
    assert sum(parameter.numel() for parameter in model.vision_tower.layers[0].parameters()) == 67_924_992
    assert round(count(model.resampler) / 1e6, 1) == 91.8


def test_the_way_back_gives_the_original_tensors(system):
    matcher = KeyMatcher(FAMILIES[system.name].key_maps[0])
    converted = converted_tensors(system.name, system.tensors)
    for name, tensor in system.tensors.items():
        matches = matcher.match_all(name)
        if matcher.dropped_reason(name) is None:
            parts = [revert_operation(entry.operation, converted[target]) for target, entry in matches]
            assert torch.equal(torch.cat(parts) if len(parts) > 1 else parts[0], tensor)


# ------------------------------------------------------------------------------------------------------- configuration


def test_sizes_come_from_the_tensors(system, sibling_folder):
    config = AutoConfig.from_pretrained(sibling_folder)
    assert config.image_token_id == system.placeholder_id
    assert config.num_query_tokens == system.num_queries
    assert (config.vision_config.hidden_size, config.vision_config.intermediate_size) == (64, 80)
    assert config.text_config.vocab_size == system.config["vocab_size"]
    assert config.vision_config.num_hidden_layers == (3 if system.name == "omnilmm" else 2)


def test_arguments_of_a_user_stay(sibling_folder):
    config, unused = AutoConfig.from_pretrained(
        sibling_folder, attn_implementation="eager", something=1, return_unused_kwargs=True
    )
    assert config._attn_implementation == "eager" and unused == {"something": 1}


def test_versions_of_minicpmv():
    """1.0's configuration has no slices; its keys' positions are interpolated, not computed."""
    positions = [
        FAMILIES["minicpmv"].config_class.from_dict(small_minicpmv(version).config) for version in ("1.0", "2.0")
    ]
    assert [config.resampler_config.key_positions for config in positions] == ["interpolated", "computed"]


@pytest.mark.parametrize(
    ("keys", "version"),
    [({"hidden_size": 4096}, "2.5"), ({"hidden_size": 3584, "version": 2.6}, "2.6"), ({"hidden_size": 1}, "2.5 or")],
)
@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModel, AutoModelForImageTextToText])
def test_later_minicpmv_is_refused_by_name(tmp_path, keys, version, auto_class):
    write_json(tmp_path / "config.json", {"model_type": "minicpmv", "vision_config": {}, "query_num": 96, **keys})
    with pytest.raises(ValueError, match=f"MiniCPM-V {version}.*openbmb/MiniCPM-V-2.*trust_remote_code"):
        auto_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_encoder": "resnet50"}, "vision tower 'resnet50'; known are .*vit_so400m"),
        ({"query_num": None}, "lacks query_num"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES["minicpmv"].config_class.from_dict(small_minicpmv(**changes).config)


@pytest.mark.parametrize("place", ["timm/", "/models/", "C:\\\\models\\\\", ""])
def test_vision_tower_of_omnilmm_by_its_name_or_a_path(place):
    original = {**small_omnilmm().config, "mm_vision_tower": f"{place}eva02_enormous_patch14_clip_224.laion2b_plus"}
    config = FAMILIES["omnilmm"].config_class.from_dict({**original, "num_query": 256})
    assert (config.vision_config.hidden_size, config.num_query_tokens) == (1792, 256)


def test_omnilmm_without_marks_around_images_is_refused():
    with pytest.raises(ValueError, match="mm_use_im_start_end false"):
        FAMILIES["omnilmm"].config_class.from_dict({**small_omnilmm().config, "mm_use_im_start_end": False})


def test_visualcla_without_resampler_is_refused():
    with pytest.raises(ValueError, match="without resampler"):
        FAMILIES["visualcla"].config_class.from_dict({**small_visualcla().config, "use_visual_resampler": False})


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_placeholder_is_where_the_tokenizer_has_it(tmp_path, file):
    folder = small_omnilmm().write(tmp_path)
    write_json(
        folder / file,
        {
            "added_tokens.json": {"<im_patch>": 380},
            "tokenizer_config.json": {"added_tokens_decoder": {"380": {"content": "<im_patch>"}}},
            "tokenizer.json": {"added_tokens": [{"id": 380, "content": "<im_patch>"}]},
        }[file],
    )
    assert AutoConfig.from_pretrained(folder).image_token_id == 380


# ------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(sibling_folder, dtype):
    model = AutoModelForImageTextToText.from_pretrained(sibling_folder, dtype=dtype)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    assert model.config.name_or_path == str(sibling_folder)


@torch.no_grad()
def test_half_precision_runs(system, sibling_folder):
    model = AutoModel.from_pretrained(sibling_folder, dtype=torch.bfloat16).eval()
    prompt = sample(system, 2)
    logits = model(**model_inputs([prompt])).logits[0]
    expected = system.logits(prompt.ids, prompt.views)
    similarity = torch.nn.functional.cosine_similarity(logits.float().flatten(), expected.flatten(), dim=0)
    assert similarity > 0.999


def test_trusted_remote_code_is_not_needed(sibling, sibling_folder):
    """The original's scripts ask for it; what they would run no longer works."""
    for auto_class in (AutoModel, AutoModelForCausalLM):
        model = auto_class.from_pretrained(sibling_folder, trust_remote_code=True)
        assert type(model) is type(sibling)


def test_generation_config_of_the_folder(tmp_path):
    folder = small_minicpmv().write(tmp_path)
    GenerationConfig(max_new_tokens=17, eos_token_id=2).save_pretrained(folder)
    assert AutoModel.from_pretrained(folder).generation_config.max_new_tokens == 17


@torch.no_grad()
def test_single_files_and_both_formats(tmp_path):
    system = small_minicpmv("2.0")
    prompt = sample(system, 1)
    expected = system.logits(prompt.ids, prompt.views)
    for number, file in enumerate(("model.safetensors", "pytorch_model.bin", "pytorch_model.v1.bin")):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_json(folder / "config.json", system.config)
        if file.endswith("bin"):
            torch.save(system.tensors, folder / file)
        else:
            save_file(system.tensors, folder / file, metadata={"format": "pt"})
        logits = AutoModel.from_pretrained(folder).eval()(**model_inputs([prompt])).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "dtype"])
def test_tensors_that_do_not_fit(tmp_path, fault):
    folder = small_minicpmv().write(tmp_path)
    name = "vpm.blocks.0.attn.qkv.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    tensors |= {
        "missing": {},
        "extra": {"vpm.something": torch.ones(2)},
        "shape": {name: torch.ones(3, 5)},
        "dtype": {name: torch.ones(192, 64, dtype=torch.int8)},
    }[fault]
    if fault == "missing":
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    message = {
        "missing": r"3 tensors missing \(vision_tower.*q_proj.weight",
        "extra": r"1 unknown tensors \(vpm.something\)",
        "shape": r"3 tensors of another shape \(.* is \(1, 5\) instead of \(64, 64\)",
        "dtype": "3 tensors of no floating point type",
    }[fault]
    with pytest.raises(OriginalCheckpointError, match=message):
        AutoModel.from_pretrained(folder)


def test_missing_shard(tmp_path):
    folder = small_omnilmm().write(tmp_path)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="lacks pytorch_model-00002"):
        AutoModel.from_pretrained(folder)


def test_index_that_leads_outside_is_refused(tmp_path):
    folder = small_omnilmm().write(tmp_path / "model")
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text("utf-8"))
    content["weight_map"]["lm_head.weight"] = "../secret.bin"
    write_json(index, content)
    with pytest.raises(ValueError, match="was refused"):
        AutoModel.from_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------- VisualCLA


@torch.no_grad()
def test_adapter_and_bases_are_the_merged_model(visualcla_release):
    system = small_visualcla()
    model = AutoModelForImageTextToText.from_pretrained(
        visualcla_release.adapter,
        text_model=visualcla_release.text_model,
        vision_model=visualcla_release.vision_model,
    ).eval()
    prompt = sample(system, 1)
    logits = model(**model_inputs([prompt])).logits[0]
    torch.testing.assert_close(logits, system.logits(prompt.ids, prompt.views), atol=1e-5, rtol=0)
    assert model.config.text_config.vocab_size == system.config["vocab_size"]


def test_merged_folder_with_its_head_tied(tmp_path):
    """The original's script saved embedding and head as one storage."""
    folder = small_visualcla().write(tmp_path / "tied")
    text = folder / "text_encoder"
    tensors = {
        name: tensor for file in text.glob("*.bin") for name, tensor in torch.load(file, weights_only=True).items()
    }
    for file in text.glob("pytorch_model*"):
        file.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, text / "pytorch_model.bin")
    model = AutoModelForImageTextToText.from_pretrained(folder).language_model
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
@pytest.mark.parametrize("given", ["none", "text_model", "vision_model"])
def test_adapter_without_a_base_says_which(visualcla_release, auto_class, given):
    bases = {} if given == "none" else {given: getattr(visualcla_release, given)}
    missing = {
        "none": "text_model .*Chinese-Alpaca-Plus-7B.* and vision_model .*clip-vit-large-patch14",
        "text_model": "give vision_model",
        "vision_model": "give text_model",
    }[given]
    with pytest.raises(ValueError, match=f"VisualCLA's adapter alone.*{missing}"):
        auto_class.from_pretrained(visualcla_release.adapter, **bases)


def test_wrong_base_vocabulary(tmp_path):
    system = small_visualcla()
    system.extra["text"]["model.embed_tokens.weight"] = torch.zeros(320, 256)
    release = write_visualcla_release(system, tmp_path)
    with pytest.raises(ValueError, match="vocabulary of 320 tokens, but the adapter was made for one of 396"):
        AutoModel.from_pretrained(release.adapter, text_model=release.text_model, vision_model=release.vision_model)


def test_base_of_another_width(tmp_path):
    system = small_visualcla()
    system.extra["text"]["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(128, 128)
    release = write_visualcla_release(system, tmp_path)
    with pytest.raises(ValueError, match="another model or size"):
        AutoModel.from_pretrained(release.adapter, text_model=release.text_model, vision_model=release.vision_model)


def test_half_a_change(tmp_path):
    system = small_visualcla()
    name = next(name for name in system.extra["adapter"] if name.endswith("lora_A.weight"))
    del system.extra["adapter"][name]
    release = write_visualcla_release(system, tmp_path)
    with pytest.raises(ValueError, match="one half only of the change"):
        AutoModel.from_pretrained(release.adapter, text_model=release.text_model, vision_model=release.vision_model)


@pytest.mark.parametrize("part", ["text_encoder", "vision_encoder"])
def test_merged_folder_without_a_part(tmp_path, part):
    folder = small_visualcla().write(tmp_path)
    (folder / part).rename(folder / "elsewhere")
    with pytest.raises(OSError, match=f"lacks {part}/"):
        AutoModel.from_pretrained(folder)


def test_bases_for_what_is_no_adapter(tmp_path):
    folder = small_visualcla().write(tmp_path)
    with pytest.raises(ValueError, match="is a whole model"):
        AutoModel.from_pretrained(folder, text_model=folder)


# ------------------------------------------------------------------------------------------------------- a new family


class CogVLMConfig(MiniCPMVConfig):
    model_type = "cogvlm"


class CogVLMForConditionalGeneration(MiniCPMVForConditionalGeneration):
    config: CogVLMConfig


def test_a_new_family_is_one_row(tmp_path, monkeypatch):
    """The row of CONTRIBUTING.md, with another system's tensors."""
    row = Family(
        "cogvlm",
        "CogVLM",
        CogVLMConfig,
        _answering(CogVLMForConditionalGeneration),
        (key_maps.MINICPMV,),
        MiniCPMVProcessor,
        LegacySentencePieceTokenizer,
        form=COMPOSITE_FORM,
    )
    monkeypatch.setitem(FAMILIES, "cogvlm", row)
    register()
    write_folder("minicpmv-1.0", tmp_path / "minicpmv")
    folder = write_folder("minicpmv-1.0", tmp_path / "cogvlm")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "cogvlm"}), "utf-8")
    model, other = (AutoModel.from_pretrained(tmp_path / name) for name in ("cogvlm", "minicpmv"))
    assert type(model) is CogVLMForConditionalGeneration
    torch.testing.assert_close(model.state_dict(), other.state_dict(), atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(folder)("a b").input_ids
    model.save_pretrained(tmp_path / "saved")
    assert type(AutoModel.from_pretrained(tmp_path / "saved")) is CogVLMForConditionalGeneration
