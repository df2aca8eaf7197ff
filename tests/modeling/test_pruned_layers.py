"""CPM-Bee with blocks that pruning removed (cpm-bee-1b, -2b and -5b): what is left computes, the rest is not there."""

import copy

import pytest
import torch
from support import PRUNED_CASE, Golden, reference_options
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from viscpm_hf import CpmBeeConfig, CpmBeeForCausalLM, CpmBeeTokenizer
from viscpm_hf.modeling import fast_decoding_cpm_bee
from viscpm_hf.modeling.cache_cpm_bee import CpmBeeCache


GOLDEN = Golden(PRUNED_CASE)
# (attention, feed-forward) of every layer; true: not there.
PATTERNS = {
    "as recorded": GOLDEN.llm_config["mask_modules"],
    "ends missing": [(True, False), (False, False), (True, True), (False, True)],
    "first layer missing": [(True, True), (True, True), (False, False), (True, False)],
    "one attention": [(True, False), (True, True), (False, True), (True, True)],
}
tight = {"atol": 1e-5, "rtol": 1e-5}


def small_config(pattern, **kwargs) -> CpmBeeConfig:
    return CpmBeeConfig(
        vocab_size=297, hidden_size=32, intermediate_size=40, num_hidden_layers=len(pattern), num_attention_heads=4,
        head_dim=6, position_bias_num_buckets=16, position_bias_num_segment_buckets=64,
        position_bias_max_distance=40, initializer_range=0.3, mask_modules=pattern, **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> CpmBeeTokenizer:
    return CpmBeeTokenizer(str(GOLDEN.vocab))


@pytest.fixture(scope="module", params=PATTERNS)
def pattern(request):
    return PATTERNS[request.param]


@pytest.fixture(scope="module")
def small_model(pattern) -> CpmBeeForCausalLM:
    torch.manual_seed(0)
    return CpmBeeForCausalLM(small_config(pattern)).eval()


@pytest.fixture
def inputs(tokenizer):
    documents = [{"input": "红色的圆形 is", "<ans>": ""}, {"input": "蓝 🙂 cat", "<ans>": {"a": "", "b": ""}}]
    encoded = [tokenizer.encode_document(document).prompt(open_slot=0) for document in documents]
    return tokenizer.collate(encoded, padding_side="left", return_tensors="pt")


def without_end(model, inputs, **kwargs) -> torch.Tensor:
    """Sequences of full length, so that every cache is used to its end."""
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **kwargs)


# --------------------------------------------------------------------------------------------------------- the blocks


def test_blocks_that_are_missing_have_no_tensors(small_model, pattern):
    for index, (no_attention, no_mlp) in enumerate(pattern):
        names = {name.split(".")[0] for name in small_model.model.layers[index].state_dict()}
        expected = set() if no_attention else {"input_layernorm", "self_attn"}
        assert names == expected | (set() if no_mlp else {"post_attention_layernorm", "mlp"})
    assert small_model.config.num_attention_layers == [attention for attention, _ in pattern].count(False)


@torch.no_grad()
def test_hidden_states_pass_missing_blocks_unchanged(small_model):
    """Every layer against its definition with the whole blocks that it has."""
    hidden_states = torch.randn(2, 5, 32)
    bias = torch.zeros(1, 4, 5, 5)
    for layer in small_model.model.layers:
        expected = hidden_states
        if layer.self_attn is not None:
            expected = (expected + layer.self_attn(layer.input_layernorm(expected), bias)[0]) / 1.05
        if layer.mlp is not None:
            expected = (expected + layer.mlp(layer.post_attention_layernorm(expected))) / 1.05
        assert_close(layer(hidden_states, bias), expected, **tight)
        assert (layer(hidden_states, bias) is hidden_states) == (layer.self_attn is None and layer.mlp is None)


@torch.no_grad()
def test_eager_attention_is_sdpa(small_model, inputs):
    eager = copy.deepcopy(small_model)
    eager.set_attn_implementation("eager")
    outputs = eager(**inputs, output_hidden_states=True, output_attentions=True)
    assert_close(outputs.logits, small_model(**inputs).logits, atol=1e-4, rtol=0)
    assert len(outputs.hidden_states) == len(small_model.model.layers) + 1
    assert len(outputs.attentions) == small_model.config.num_attention_layers


def test_a_pattern_without_missing_blocks_is_none():
    config = small_config([(False, False)] * 3)
    assert config.mask_modules is None and config.num_attention_layers == 3
    assert small_config([[1, 0], (False, True)]).mask_modules == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("mask_modules", "message"),
    [
        ([[True, False]] * 3, "mask_modules has entries for 3 layers, but num_hidden_layers is 2"),
        ([[True, False], [True]], r"but \[True\] for layer 1"),
        ([[True, False], True], "but True for layer 1"),
        ([[True, False], ["yes", False]], r"but \['yes', False\] for layer 1"),
        ([[True, False], [True, True]], "leaves none of 2 layers its attention"),
    ],
)
def test_patterns_that_make_no_sense(mask_modules, message):
    with pytest.raises(ValueError, match=message):
        CpmBeeConfig(num_hidden_layers=2, mask_modules=mask_modules)


# ---------------------------------------------------------------------------------------------------------- the caches


@torch.no_grad()
def test_every_cache_has_entries_for_layers_with_attention_alone(small_model, inputs):
    expected = without_end(small_model, inputs, use_cache=False)
    num_entries = small_model.config.num_attention_layers
    length = expected.shape[1]
    caches = {
        "growing": CpmBeeCache(),
        "dynamic": DynamicCache(),
        "dynamic of the configuration": DynamicCache(config=small_model.config),
        "static of the configuration": StaticCache(small_model.config, max_cache_len=length),
    }
    for name, cache in caches.items():
        assert torch.equal(without_end(small_model, inputs, past_key_values=cache), expected), name
        filled = [layer.keys is not None for layer in cache.layers]
        assert filled == [True] * num_entries + [False] * (len(filled) - num_entries), name
        assert cache.get_seq_length() == length - 1, name
    for implementation in ("dynamic", "static"):
        outputs = without_end(
            small_model, inputs, cache_implementation=implementation, return_dict_in_generate=True,
            disable_compile=True,
        )  # fmt: skip
        assert torch.equal(outputs.sequences, expected), implementation
        assert len(outputs.past_key_values.layers) == num_entries, implementation


@torch.no_grad()
def test_rows_of_a_batch_are_those_alone(small_model, tokenizer, inputs):
    logits = small_model(**inputs).logits
    for row in range(2):
        mask = inputs["attention_mask"][row].bool()
        alone = {
            name: inputs[name][row : row + 1, mask] if name.endswith("ids") or name == "attention_mask"
            else inputs[name][row : row + 1]
            for name in inputs
        }  # fmt: skip
        assert_close(logits[row, mask], small_model(**alone).logits[0], **tight)


@pytest.mark.parametrize(
    "generation", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=["beams", "prompt lookup"]
)
def test_ways_of_decoding(small_model, inputs, generation):
    """Re-ordered and cropped caches: the same sequences as without any."""
    row = {name: value[:1] for name, value in inputs.items()}
    plain = generation if "num_beams" in generation else {}
    expected = without_end(small_model, row, use_cache=False, **plain)
    assert torch.equal(without_end(small_model, row, **generation), expected)


def test_fast_decoding_and_fused_projections(small_model, inputs, tokenizer, monkeypatch):
    monkeypatch.setattr(fast_decoding_cpm_bee, "compilation_problem", lambda model, device: "not in this test")
    monkeypatch.setattr(fast_decoding_cpm_bee, "LEAST_PLACES", 4)
    model = copy.deepcopy(small_model)
    documents = [{"input": "蓝 🙂 cat", "<ans>": {"a": "", "b": ""}}, {"input": "图片", "<ans>": ""}]
    expected, filled = without_end(model, inputs), model.fill(documents, tokenizer, max_new_tokens=8)
    names = model.state_dict().keys()
    model.fuse_projections()
    assert torch.equal(without_end(model, inputs), expected)
    assert torch.equal(without_end(model, inputs, fast=True), expected)
    assert model.fill(documents, tokenizer, max_new_tokens=8, fast=True) == filled
    (graph, *_) = model.fast_decoder.graphs.values()
    assert len(graph.keys) == model.config.num_attention_layers
    model.unfuse_projections()
    assert model.state_dict().keys() == names


# ------------------------------------------------------------------------------------------------ files and training


def test_saved_is_loaded(small_model, inputs, tmp_path):
    small_model.save_pretrained(tmp_path)
    loaded, report = CpmBeeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.mask_modules == small_model.config.mask_modules
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, small_model(**inputs).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_weights_train(small_model, tokenizer, checkpointing):
    model = copy.deepcopy(small_model).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    documents = [{"input": "红色的圆形 is", "<ans>": "蓝"}, {"input": "月", "<ans>": {"a": "cat", "b": "🙂 图片"}}]
    model(**tokenizer.prepare_for_finetune(documents)).loss.backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not without


@pytest.fixture(scope="module")
def golden_model() -> CpmBeeForCausalLM:
    config = CpmBeeConfig(**GOLDEN.llm_config)
    return CpmBeeForCausalLM.from_pretrained(
        None, config=config, state_dict=GOLDEN.state_dict(), dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("case", range(len(GOLDEN.expected["documents"])))
def test_documents_are_the_reference_s(golden_model, tokenizer, case):
    case = GOLDEN.expected["documents"][case]
    filled = golden_model.fill(case["documents"], tokenizer, **reference_options(case["generate"]))
    assert [document["<ans>"] for document in filled] == case["results"]
