"""CPM-Bee's parts against their definitions, and who sees whom."""

import math

import pytest
import torch
from support import Golden
from torch.testing import assert_close

from viscpm_hf import CpmBeeConfig, CpmBeeForCausalLM, CpmBeeTokenizer
from viscpm_hf.modeling.token_space_cpm_bee import MASKED_LOGIT


tight = {"atol": 1e-5, "rtol": 1e-5}


def small_config(**kwargs) -> CpmBeeConfig:
    sizes = dict(
        vocab_size=297,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=6,
        position_bias_num_buckets=16,
        position_bias_num_segment_buckets=64,
        position_bias_max_distance=40,
        initializer_range=0.3,
    )
    return CpmBeeConfig(**(sizes | kwargs))


@pytest.fixture(scope="module")
def small_model() -> CpmBeeForCausalLM:
    torch.manual_seed(0)
    return CpmBeeForCausalLM(small_config()).eval()


@pytest.fixture(scope="module")
def small_tokenizer() -> CpmBeeTokenizer:
    return CpmBeeTokenizer(str(Golden("chat_a").vocab))


def bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """The definition, one distance at a time."""
    half = num_buckets // 2
    exact = half // 2
    n = abs(distance)
    if n >= exact:
        n = min(exact + int(math.log(n / exact) / math.log(max_distance / exact) * (half - exact)), half - 1)
    return n + half * (distance > 0)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(16, 40), (32, 128), (256, 2048)])
def test_distance_buckets(num_buckets, max_distance):
    config = small_config(position_bias_num_buckets=num_buckets, position_bias_max_distance=max_distance)
    position_bias = CpmBeeForCausalLM(config).model.position_bias
    distances = torch.arange(-max_distance - 50, max_distance + 51)
    expected = [bucket(distance, num_buckets, max_distance) for distance in distances.tolist()]
    assert position_bias.distance_bucket(distances).tolist() == expected


def test_bias_is_of_the_distance_within_and_of_the_relation_between_segments(small_model):
    position_bias = small_model.model.position_bias
    table, config = position_bias.relative_attention_bias.weight, small_model.config
    segments, relations = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[[0, 10], [3, 0]]])
    positions = torch.tensor([[0, 1, 2, 7]])
    bias = position_bias(positions, positions, segments, segments, relations)
    assert bias.shape == (1, 4, 4, 4)
    for query in range(4):
        for key in range(4):
            relation = relations[0, segments[0, query], segments[0, key]]
            distance = int(positions[0, key] - positions[0, query])
            row = bucket(distance, 16, 40) if relation == 0 else config.position_bias_num_buckets + relation - 1
            assert torch.equal(bias[0, :, query, key], table[row])


def test_rotation_by_the_extension_number(small_model):
    embeddings, numbers = torch.randn(3, 32), torch.tensor([0, 1, 7])
    rotated = small_model.model.rotate(embeddings, numbers)
    assert torch.equal(rotated[0], embeddings[0])
    for row, number in enumerate(numbers.tolist()):
        for k in range(16):
            angle = 16 * number * 10000 ** (-2 * k / 32)
            first, second = embeddings[row, k], embeddings[row, k + 16]
            assert_close(rotated[row, k], first * math.cos(angle) - second * math.sin(angle), **tight)
            assert_close(rotated[row, k + 16], second * math.cos(angle) + first * math.sin(angle), **tight)


@torch.no_grad()
def test_head_and_embedding_speak_of_extension_tokens_alike(small_model):
    """The logit of token e is the product with the embedding that the input of e has."""
    ids, table = torch.tensor([[5, 297, 298, 9]]), torch.tensor([[[1, 1], [9, 2]]])
    outputs = small_model(ids, extension_table=table, output_hidden_states=True)
    assert outputs.logits.shape == (1, 4, small_model.config.vocab_size)
    embeddings = small_model.model.embed(torch.arange(299)[None], table)[0]
    assert_close(outputs.logits[..., :299], outputs.hidden_states[-1] @ embeddings.T, **tight)
    assert (outputs.logits[..., 299:] == MASKED_LOGIT).all()


@pytest.mark.parametrize("table", [None, torch.zeros(1, 0, 3, dtype=torch.long), torch.tensor([[[9, 3], [9, 0]]])])
def test_a_slot_that_stands_for_nothing_is_an_error(small_model, table):
    with pytest.raises(ValueError, match="the token 298, a slot .* doesn't say for which one"):
        small_model(torch.tensor([[5, 298]]), extension_table=table)


def test_a_placeholder_without_an_image_is_an_error(small_model):
    token = small_model.config.placeholder_token_id
    with pytest.raises(ValueError, match=rf"2 placeholders of images \(id {token}\), but there are no images"):
        small_model(torch.tensor([[5, token, token]]))


def test_looked_up_embeddings_are_the_ids(small_model):
    """Prompt tuning looks embeddings up without knowing of extension tokens."""
    ids, table = torch.tensor([[5, 297, 298, 9]]), torch.tensor([[[1, 1], [9, 2]]])
    looked_up = small_model.get_input_embeddings()(ids)
    assert_close(
        small_model(inputs_embeds=looked_up, extension_table=table).logits,
        small_model(ids, extension_table=table).logits,
    )


# ------------------------------------------------------------------------------------------------------- who sees whom


def test_context_sees_context_and_answers_see_backwards(small_model):
    kinds = torch.tensor([[0, 0, 1, 1]])
    visible = small_model.model.visible_keys(None, kinds, torch.arange(4), 4)
    assert visible.int().tolist() == [[[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]


def test_padding_sees_and_is_seen_by_nobody(small_model):
    mask, kinds = torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]])
    visible = small_model.model.visible_keys(mask, kinds, torch.arange(3), 3)
    assert visible.int().tolist() == [[[0, 0, 0], [0, 1, 0], [0, 1, 1]]]


@torch.no_grad()
def test_without_a_document_it_is_a_causal_model(small_model):
    ids = torch.randint(9, 290, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = small_model(ids).logits
    changed = ids.clone()
    changed[:, 8:] = 20
    assert_close(small_model(changed).logits[:, :8], logits[:, :8], **tight)
    assert not torch.allclose(small_model(changed).logits[:, 8:], logits[:, 8:], atol=1e-2)


@torch.no_grad()
def test_a_prompt_is_read_in_both_directions(small_model, small_tokenizer):
    def logits(question):
        document = small_tokenizer.encode_document({"context": "cat", "question": question, "<ans>": ""})
        return small_model(**small_tokenizer.collate([document], return_tensors="pt")).logits

    assert not torch.allclose(logits("moon")[:, 4], logits("dog")[:, 4], atol=1e-2)


@torch.no_grad()
def test_order_of_segments_does_not_matter(small_model, small_tokenizer):
    """Their relations carry the structure: `EncodedDocument.prompt` relies on it."""
    document = small_tokenizer.encode_document({"a": "cat and dog", "b": {"x": "moon", "y": "ocean"}, "<ans>": ""})
    inputs = small_tokenizer.collate([document], return_tensors="pt")
    expected = small_model(**inputs).logits
    segments = torch.randperm(inputs["segment_relations"].shape[-1] - 1, generator=torch.Generator().manual_seed(0))
    places = [(inputs["segment_ids"][0] == segment).nonzero().flatten() for segment in segments]
    order = torch.cat([*places, torch.tensor([len(document) - 1])])
    for name in ("input_ids", "segment_ids", "token_type_ids", "attention_mask"):
        inputs[name] = inputs[name][:, order]
    assert order.tolist() != sorted(order.tolist())
    assert_close(small_model(**inputs).logits, expected[:, order], **tight)


@torch.no_grad()
def test_bias_given_stands_for_all_structure(small_model):
    ids = torch.randint(9, 290, (1, 6))
    model = small_model.model
    bias, _ = model.prepare_bias(model.embed(ids), None, None, None, None, None)
    assert_close(model(ids, position_bias=bias).last_hidden_state, model(ids).last_hidden_state)


@torch.no_grad()
def test_masks_of_four_dimensions(small_model):
    """As transformers' own code hands them: true or 0 for visible."""
    ids = torch.randint(9, 290, (2, 6))
    visible = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = small_model(ids).logits
    for mask in (visible, additive):
        assert_close(small_model(ids, attention_mask=mask).logits, expected)


@torch.no_grad()
def test_all_padding_row_stays_finite(small_model):
    ids, mask = torch.randint(9, 290, (2, 6)), torch.tensor([[0] * 6, [1] * 6])
    for implementation in ("sdpa", "eager"):
        small_model.set_attn_implementation(implementation)
        try:
            assert torch.isfinite(small_model(ids, attention_mask=mask).logits).all()
        finally:
            small_model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_attends_to_nothing(implementation):
    """Not to the mean of all values either: VisCPM-Paint hands the hidden states of padding on."""
    torch.manual_seed(0)
    model = CpmBeeForCausalLM(small_config(attn_implementation=implementation)).eval().model
    ids, mask = torch.randint(9, 290, (2, 6)), torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    ids[:, 4:] = 0
    hidden_states = model(ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).last_hidden_state
    assert not torch.allclose(hidden_states[0, :4], hidden_states[1, :4], atol=1e-2)
    assert torch.equal(hidden_states[0, 4:], hidden_states[1, 4:])


@pytest.mark.parametrize("inputs", [{}, {"input_ids": torch.ones(1, 2).long(), "inputs_embeds": torch.ones(1, 2, 32)}])
def test_ids_or_embeddings(small_model, inputs):
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        small_model(**inputs)


# -------------------------------------------------------------------------------------------------------------- losses


def test_loss_counts_extension_tokens(small_model):
    ids, table = torch.tensor([[5, 297, 298, 9]]), torch.tensor([[[1, 1], [9, 2]]])
    labels = torch.tensor([[-100, 297, 298, -100]])
    outputs = small_model(ids, extension_table=table, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[0, :2], labels[0, 1:3])
    assert_close(outputs.loss, expected)


def test_last_logits_alone(small_model):
    ids = torch.randint(9, 290, (2, 6))
    assert_close(small_model(ids, logits_to_keep=1).logits, small_model(ids).logits[:, -1:])


# ------------------------------------------------------------------------------------------------------- configuration


def test_original_spelling_of_sizes():
    config = CpmBeeConfig(
        dim_model=48,
        num_heads=4,
        num_layers=3,
        dim_ff=96,
        dim_head=16,
        eps=1e-5,
        init_std=0.5,
        half=True,
        dropout_p=0.0,
    )
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (48, 4, 3)
    assert (config.intermediate_size, config.head_dim, config.rms_norm_eps) == (96, 16, 1e-5)
    assert config.initializer_range == 0.5
    assert not {"half", "dropout_p", "dim_model"} & set(config.to_dict())
    assert CpmBeeConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_odd_number_of_buckets():
    with pytest.raises(ValueError, match="multiple of 4 .*got 30"):
        CpmBeeConfig(position_bias_num_buckets=30)
