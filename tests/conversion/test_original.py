"""Reading the original's files: what they are, their sizes, and one clear error for every damaged one."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from support import GOLDEN, HUB_SPELLING, Golden

from viscpm_hf import OriginalCheckpointError, VisCPMChat, VisCPMChatForConditionalGeneration
from viscpm_hf.checkpoints.location import find_original, kind_of
from viscpm_hf.checkpoints.original import (
    CHAT,
    CPM_BEE,
    PAINT,
    chat_config,
    checkpoint_kind,
    load_state_dict,
    read_json,
    text_config,
)


GOLDEN_A = Golden("chat_a")


def shapes_of(golden) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in golden.state_dict().items()}


def write_file(folder: Path, state_dict) -> Path:
    """An original file with everything that belongs beside it."""
    GOLDEN_A.write_layout(folder)
    (folder / "config.json").unlink()
    (folder / "pytorch_model.bin").unlink()
    (folder / "cpm-bee.json").write_text(json.dumps(GOLDEN_A.llm_config), "utf-8")
    (folder / "vision.json").write_text(json.dumps(GOLDEN_A.vision_config), "utf-8")
    torch.save(state_dict, folder / "chat.pt")
    return folder / "chat.pt"


# --------------------------------------------------------------------------------------------------------------- kinds


def test_kinds(golden):
    names = golden.state_dict()
    llm = {name.removeprefix("llm."): tensor for name, tensor in names.items() if name.startswith("llm.")}
    assert checkpoint_kind(names) == CHAT
    assert checkpoint_kind(llm) == CPM_BEE
    assert checkpoint_kind({f"llm.{name}": tensor for name, tensor in llm.items()}) == CPM_BEE
    assert checkpoint_kind(load_state_dict(GOLDEN / "paint_a" / "pytorch_model.bin")) == PAINT
    assert checkpoint_kind({"encoder.layer.0.weight": None}) is None


# --------------------------------------------------------------------------------------------------------------- sizes


def test_sizes_of_both_spellings(golden):
    github = chat_config(golden.llm_config, golden.vision_config)
    hub = {HUB_SPELLING.get(key, key): value for key, value in golden.llm_config.items()}
    assert chat_config({**hub, **golden.vision_config}).to_dict() == github.to_dict()
    text, vision = github.text_config, github.vision_config
    assert (text.hidden_size, text.num_hidden_layers) == (
        golden.llm_config["dim_model"],
        golden.llm_config["num_layers"],
    )
    assert vision.num_query_tokens == github.num_query_tokens == golden.vision_config["query_num"]
    assert vision.num_attention_heads == golden.vision_config["vision_heads"]


def test_sizes_of_the_tensors(golden):
    """All but those that no shape tells: head counts of the vision tower and the distances' limit."""
    unseen = {"position_bias_num_segment_buckets": golden.llm_config["position_bias_num_segment_buckets"]}
    unseen["position_bias_max_distance"] = golden.llm_config["position_bias_max_distance"]
    found = chat_config(unseen, {"vision_heads": golden.vision_config["vision_heads"]}, shapes_of(golden))
    given = chat_config(golden.llm_config, golden.vision_config, shapes_of(golden))
    assert found.to_dict() == given.to_dict()


def test_sizes_of_the_10b_model_by_default():
    assert text_config({}).to_dict() == text_config({"dim_model": 4096, "num_layers": 48}).to_dict()
    config = chat_config({"query_num": 64, "vision_dim": 1024})
    assert (config.vision_config.num_attention_heads, config.vision_config.image_size) == (16, 224)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "viscpmchatbee"}, True),
        ({"model_type": "cpmbee"}, True),
        ({"model_type": "viscpm_chat"}, False),
        ({"model_type": "llama", "dim_model": 1, "dim_ff": 2}, False),
        ({"dim_model": 1, "dim_ff": 2}, True),
        ({"hidden_size": 1}, False),
    ],
)
def test_whose_configuration_it_is(config, expected):
    assert (kind_of(config) is not None) is expected


def test_a_folder_saved_by_us_is_not_the_originals(saved_folder):
    assert find_original(saved_folder) is None


# ------------------------------------------------------------------------------------------------------- damaged files


def test_code_in_a_file_never_runs(tmp_path):
    class Attack:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/owned",))

    path = tmp_path / "evil.bin"
    torch.save({"query": Attack()}, path)
    plain = tmp_path / "plain.bin"
    plain.write_bytes(pickle.dumps({"query": Attack()}))
    for file in (path, plain):
        with pytest.raises(OriginalCheckpointError, match="evil|plain") as caught:
            load_state_dict(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(OriginalCheckpointError, match="evil.bin was refused: it holds more than tensors"):
        VisCPMChat(path, vocab_path=GOLDEN_A.vocab)
    folder = GOLDEN_A.write_layout(tmp_path / "folder")
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(OriginalCheckpointError, match="was refused"):
        VisCPMChatForConditionalGeneration.from_pretrained(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kept", [0, 1, 1000, 400_000, -1])
def test_truncated_file_is_one_clear_error(tmp_path, kept):
    path = tmp_path / "model.bin"
    path.write_bytes(GOLDEN_A.weights.read_bytes()[:kept])
    with pytest.raises(
        OriginalCheckpointError, match=r"model.bin \([\d,]+ bytes\) is no readable PyTorch file"
    ) as caught:
        load_state_dict(path)
    assert f"({path.stat().st_size:,} bytes)" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.ones(1)], "holds a list, not a dict of tensors"),
        ({}, "holds a dict, not a dict of tensors|empty"),
        ({"a": torch.ones(1), "b": 3, "c": "x"}, "2 of 3 entries are none .*b, c"),
        ({"a": torch.ones(1), 7: torch.ones(1)}, "1 of 2 entries are none .7"),
        ({"a": torch.ones(1), "b": torch.ones(2)}, "is no VisCPM or CPM-Bee checkpoint: its 2 tensors .*a, b"),
    ],
)
def test_other_contents_are_one_clear_error(tmp_path, content, complaint):
    with pytest.raises(OriginalCheckpointError, match=complaint):
        VisCPMChat(write_file(tmp_path, content))


def test_other_files_are_one_clear_error(tmp_path):
    path = tmp_path / "picture.bin"
    path.write_bytes(GOLDEN_A.image(0).read_bytes())
    with pytest.raises(OriginalCheckpointError, match="picture.bin"):
        load_state_dict(path)
    with pytest.raises(FileNotFoundError, match="missing.bin"):
        load_state_dict(tmp_path / "missing.bin")
    with pytest.raises(OSError, match=tmp_path.name):
        load_state_dict(tmp_path)


def test_state_dict_within_a_dict(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"state_dict": GOLDEN_A.state_dict()}, path)
    assert load_state_dict(path).keys() == GOLDEN_A.state_dict().keys()


# ------------------------------------------------------------------------------------------------------- wrong tensors


def wrong_tensors() -> dict[str, tuple[dict, str]]:
    """By name: what is done to the tensors, and what the error says."""
    query, layer = "query", "llm.encoder.layers.1.ffn.ffn.w_out.weight"
    tensors = GOLDEN_A.state_dict()
    shape = tuple(tensors[layer].shape)
    return {
        "missing": (
            {name: tensor for name, tensor in tensors.items() if name != layer},
            r"1 tensors missing \(model.language_model.layers.1.mlp.down_proj.weight\)",
        ),
        "missing layer": (
            {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name},
            r"\d+ tensors missing \(model.language_model.layers.2",
        ),
        "extra": ({**tensors, "llm.lora.weight": torch.ones(2)}, r"1 unknown tensors \(llm.lora.weight\)"),
        "extra layer": (
            {**tensors, "llm.encoder.layers.7.self_att.layernorm_before_attention.weight": torch.ones(48)},
            r"1 unknown tensors \(llm.encoder.layers.7",
        ),
        "transposed": (
            {**tensors, layer: tensors[layer].T.contiguous()},
            rf"1 tensors of another shape \({layer} is \({shape[1]}, {shape[0]}\) instead of \({shape[0]}, {shape[1]}",
        ),
        "layer without number": (
            {**tensors, "llm.encoder.layers.x.weight": torch.ones(2)},
            r"1 unknown tensors \(llm.encoder.layers.x.weight\)",
        ),
        "quantised": (
            {**tensors, layer: tensors[layer].to(torch.int8)},
            rf"1 tensors of no floating point type \({layer} is of int8\)",
        ),
        "without query": (
            {name: tensor for name, tensor in tensors.items() if name != query},
            r"1 tensors missing \(model.vision_tower.embeddings.query_tokens\)",
        ),
        "everything": (
            {**{name: tensor for name, tensor in tensors.items() if name != query}, "odd": torch.ones(1)},
            "1 tensors missing .*; 1 unknown tensors .odd.",
        ),
    }


WRONG_TENSORS = wrong_tensors()


@pytest.mark.parametrize("fault", WRONG_TENSORS)
@pytest.mark.parametrize("way", ["file", "folder"])
def test_wrong_tensors_are_one_clear_error(tmp_path, way, fault):
    state_dict, complaint = WRONG_TENSORS[fault]
    path = write_file(tmp_path / "file", state_dict)
    if way == "file":
        with pytest.raises(OriginalCheckpointError, match=complaint) as caught:
            VisCPMChat(path)
    else:
        folder = GOLDEN_A.write_layout(tmp_path / "folder")
        path.replace(folder / "pytorch_model.bin")
        with pytest.raises(OriginalCheckpointError, match=complaint) as caught:
            VisCPMChatForConditionalGeneration.from_pretrained(folder)
    assert "doesn't fit its configuration" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (-1,), (1, 1, -1)])
@pytest.mark.parametrize(
    "name",
    [
        "query",
        "vpm.beit3.encoder.embed_positions.A.weight",
        "llm.input_embedding.weight",
        "llm.position_bias.relative_attention_bias",
        "llm.encoder.layers.0.ffn.ffn.w_in.w_0.weight",
    ],
)
def test_tensor_of_other_dimensions_is_one_clear_error(tmp_path, name, shape):
    tensors = GOLDEN_A.state_dict()
    tensors[name] = tensors[name].reshape(shape) if shape else torch.tensor(1.0)
    named = name.removeprefix("llm.")
    with pytest.raises(OriginalCheckpointError, match=rf"tensor {named} has the shape .* 2 dimensions"):
        VisCPMChat(write_file(tmp_path, tensors))


@pytest.mark.parametrize("value", ["wide", 3.5, [1]])
def test_configuration_of_wrong_types_is_one_clear_error(value):
    with pytest.raises(OriginalCheckpointError, match="hidden_size.*expected int"):
        text_config({"dim_model": value})
    with pytest.raises(OriginalCheckpointError, match="hidden_size.*expected int"):
        chat_config({}, {"vision_dim": value})


@pytest.mark.parametrize("way", ["file", "folder", "Auto class"])
def test_paint_checkpoint_given_to_chat(tmp_path, way):
    paint = GOLDEN / "paint_a"
    folder = GOLDEN_A.write_layout(tmp_path)
    (folder / "pytorch_model.bin").write_bytes((paint / "pytorch_model.bin").read_bytes())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "cpmbee", **json.loads((paint / "cpm-bee.json").read_text())}), "utf-8"
    )
    with pytest.raises(OriginalCheckpointError, match="Paint"):
        if way == "file":
            VisCPMChat(paint / "pytorch_model.bin")
        elif way == "folder":
            VisCPMChat(folder)
        else:
            VisCPMChatForConditionalGeneration.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"dim_model": 48', "is no JSON file"),
        (b"[1]", "holds a list, not an object"),
        (b"\xff\xfe", "is no JSON file"),
    ],
)
def test_damaged_json_is_one_clear_error(tmp_path, content, complaint):
    path = tmp_path / "cpm-bee.json"
    path.write_bytes(content)
    with pytest.raises(OriginalCheckpointError, match=f"The configuration .*cpm-bee.json {complaint}"):
        read_json(path, "The configuration")
    with pytest.raises(OriginalCheckpointError, match=complaint):
        VisCPMChat(GOLDEN_A.weights, path)
    folder = GOLDEN_A.write_layout(tmp_path / "folder")
    (folder / "config.json").write_bytes(content)
    with pytest.raises((OSError, ValueError), match="config.json|JSON"):
        VisCPMChat(folder)
