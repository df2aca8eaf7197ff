"""The maps of original tensors to ours: complete, one to one, and reversible."""

import pytest
import torch
from support import Golden

from viscpm_hf import CpmBeeForCausalLM, VisCPMChatForConditionalGeneration
from viscpm_hf.checkpoints.key_matching import KeyMatcher, shape_after
from viscpm_hf.checkpoints.original import chat_config, text_config
from viscpm_hf.checkpoints.weight_transforms import apply_operation, revert_operation
from viscpm_hf.families import key_maps


OPERATIONS = (key_maps.KEEP, key_maps.FOLD_WIDTH, key_maps.TOKEN_ROWS)
MAPS = {
    "chat": key_maps.CHAT,
    "cpm-bee": key_maps.CPM_BEE,
    "cpm-bee within": key_maps.CPM_BEE_WITHIN,
    "saved": key_maps.CPM_BEE_SAVED,
}


@pytest.mark.parametrize("key_map", MAPS.values(), ids=MAPS)
def test_entries_are_one_to_one(key_map):
    sources, targets = [entry.source for entry in key_map.entries], [entry.target for entry in key_map.entries]
    assert len(set(sources)) == len(sources)
    assert len(set(targets)) == len(targets)
    assert {entry.operation for entry in key_map.entries} <= set(OPERATIONS)
    assert not {entry.source for entry in key_map.dropped} & set(sources)


def test_every_tensor_of_a_chat_file_has_its_place(golden):
    with torch.device("meta"):
        model = VisCPMChatForConditionalGeneration(chat_config(golden.llm_config, golden.vision_config))
    places = set(model.state_dict()) - {"lm_head.weight"}
    matcher = KeyMatcher(key_maps.CHAT)
    mapped, dropped = {}, set()
    for name, tensor in golden.state_dict().items():
        match = matcher.match(name)
        if match is None:
            assert matcher.dropped_reason(name), f"{name} has no place and no reason"
            dropped.add(name)
            continue
        assert match[0] not in mapped, f"{name} and {mapped[match[0]]} have one place"
        mapped[match[0]] = name
        if match[0] in places:
            assert model.get_parameter(match[0]).shape == shape_after(match[1].operation, tensor.shape)
    assert set(mapped) == places
    assert dropped == {entry.source for entry in key_maps.CHAT.dropped}


@pytest.mark.parametrize("prefix", ["", "llm."])
def test_every_tensor_of_cpm_bee_has_its_place(golden, prefix):
    with torch.device("meta"):
        model = CpmBeeForCausalLM(text_config(golden.llm_config))
    matcher = KeyMatcher(key_maps.CPM_BEE_WITHIN if prefix else key_maps.CPM_BEE)
    names = [prefix + name.removeprefix("llm.") for name in golden.state_dict() if name.startswith("llm.")]
    assert {matcher.match(name)[0] for name in names} == set(model.state_dict()) - {"lm_head.weight"}


@pytest.mark.parametrize(
    "name", ["llm.encoder.layers.x.ffn.ffn.w_out.weight", "query.weight", "my.query", "llm.input_embedding", "unet.a"]
)
def test_other_names_have_none(name):
    assert KeyMatcher(key_maps.CHAT).match(name) is None
    assert KeyMatcher(key_maps.CHAT).dropped_reason(name) is None


def test_folding_divides_by_the_root_of_the_width():
    weight = torch.randn(3, 16)
    assert torch.equal(apply_operation(key_maps.FOLD_WIDTH, weight), weight / 4)
    assert apply_operation(key_maps.KEEP, weight) is weight


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_revert(operation):
    weight = torch.randn(5, 48)
    torch.testing.assert_close(revert_operation(operation, apply_operation(operation, weight), len(weight)), weight)


def test_rows_behind_the_words_are_told_apart():
    """In every dtype, and none of them is one of the words'."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        embedding = apply_operation(key_maps.TOKEN_ROWS, torch.randn(297, 48).to(dtype))
        assert embedding.shape == shape_after(key_maps.TOKEN_ROWS, torch.Size((297, 48))) == (704, 48)
        assert len(embedding[297:].unique(dim=0)) == 704 - 297
        assert embedding[297:, :2].min() > 0 and not embedding[297:, 2:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folding_rounds_once(dtype):
    weight = torch.randn(64, 48, dtype=torch.float32).to(dtype)
    folded = apply_operation(key_maps.FOLD_WIDTH, weight)
    assert folded.dtype == dtype
    assert torch.equal(folded, (weight.double() * 48**-0.5).to(dtype))


def test_unknown_operation():
    for function in (apply_operation, revert_operation):
        with pytest.raises(ValueError, match="unknown operation 'square'"):
            function("square", torch.ones(1))


def test_embedding_and_projections_are_folded_but_norms_and_vision_are_not():
    operations = {entry.source: entry.operation for entry in key_maps.CHAT.entries}
    folded = {source for source, operation in operations.items() if operation == key_maps.FOLD_WIDTH}
    assert operations["llm.input_embedding.weight"] == key_maps.TOKEN_ROWS
    assert len(folded) == 4 + 3  # q, k, v, out; gate, up, down
    assert all(source.startswith("llm.") and "layernorm" not in source for source in folded)


def test_released_sizes_are_covered():
    """Layer numbers of two digits, as the 10B model has them."""
    match, _ = KeyMatcher(key_maps.CHAT).match("llm.encoder.layers.47.self_att.self_attention.project_q.weight")
    assert match == "model.language_model.layers.47.self_attn.q_proj.weight"
    assert Golden("chat_a").state_dict().keys() != {}
