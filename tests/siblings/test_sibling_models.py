"""The composite against the reference, and its invariants, for every system."""

import pytest
import torch
from sibling_inputs import model_inputs, sample
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionModel,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    SiglipVisionModel,
    ViTModel,
)

from viscpm_hf.modeling.compatibility import CHECKPOINTING
from viscpm_hf.modeling.resamplers import sincos_position_embedding
from viscpm_hf.modeling.sibling_towers import resize_position_embedding


TOLERANCE = 1e-5


# -------------------------------------------------------------------------------------------------------------- parity


def test_vision_features_are_the_references(system, sibling):
    for view in sample(system, 5).views:
        outputs = sibling.get_image_features(view[None])
        tokens = outputs.last_hidden_state[0, sibling.config.num_prefix_tokens :]
        torch.testing.assert_close(tokens, system.vision_features(view), atol=TOLERANCE, rtol=0)


def test_resampler_output_is_the_references(system, sibling):
    prompt = sample(system, 5)
    inputs = model_inputs([prompt])
    features = sibling.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    expected = torch.stack([system.image_tokens(view) for view in prompt.views])
    torch.testing.assert_close(features, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_views", [0, 1, 3])
@torch.no_grad()
def test_logits_are_the_references(system, sibling, num_views):
    prompt = sample(system, num_views)
    logits = sibling(**model_inputs([prompt])).logits[0]
    torch.testing.assert_close(logits, system.logits(prompt.ids, prompt.views), atol=TOLERANCE, rtol=0)


def test_parts_are_transformers_own(system, sibling):
    towers = {"omnilmm": ViTModel, "minicpmv": SiglipVisionModel, "visualcla": CLIPVisionModel}
    language_models = {"omnilmm": MistralForCausalLM, "minicpmv": GraniteForCausalLM, "visualcla": LlamaForCausalLM}
    assert isinstance(sibling.vision_tower, towers[system.name])
    assert type(sibling.language_model) is language_models[system.name]


def test_positions_are_resized_in_fp32_with_antialiasing():
    table = torch.randn(25, 8, dtype=torch.bfloat16)
    grid = table.float().view(1, 5, 5, 8).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, (3, 7), mode="bicubic", antialias=True)[0].flatten(1).T
    assert torch.equal(resize_position_embedding(table, 3, 7), expected.bfloat16())
    assert resize_position_embedding(table, 5, 5) is table


def test_first_half_of_a_position_is_of_the_column():
    positions = sincos_position_embedding(2, 3, 8)
    zero = [0, 0, 1, 1, 0, 0, 1, 1]
    assert positions[0].tolist() == zero
    assert positions[2, 4:].tolist() == zero[4:] and positions[2, 0] == pytest.approx(0.9093, abs=1e-4)
    assert positions[3, :4].tolist() == zero[:4] and positions[3, 4] == pytest.approx(0.8415, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- invariants


@torch.no_grad()
def test_batch_is_its_items_alone(system, sibling):
    samples = [sample(system, 3, 4), sample(system, 0, 9, seed=1), sample(system, 1, 2, seed=2)]
    inputs = model_inputs(samples)
    together = sibling(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits
    for one, logits in zip(samples, together, strict=True):
        alone = sibling(**model_inputs([one])).logits[0]
        torch.testing.assert_close(logits[-len(one.ids) :], alone, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_sdpa_is_eager(system, sibling, sibling_folder):
    eager = AutoModelForImageTextToText.from_pretrained(sibling_folder, attn_implementation="eager").eval()
    assert eager.vision_tower.config._attn_implementation == "eager"
    inputs = model_inputs([sample(system, 2)])
    torch.testing.assert_close(eager(**inputs).logits, sibling(**inputs).logits, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_saved_is_loaded(system, sibling, tmp_path):
    sibling.save_pretrained(tmp_path, max_shard_size="1MB")
    inputs = model_inputs([sample(system, 2)])
    expected = sibling(**inputs).logits
    for auto_class in (AutoModelForImageTextToText, AutoModel, AutoModelForCausalLM):
        loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert type(loaded) is type(sibling)
        assert torch.equal(loaded.eval()(**inputs).logits, expected)
    assert loaded.config.to_dict()["resampler_config"] == sibling.config.to_dict()["resampler_config"]


@torch.no_grad()
def test_embeddings_in_place_of_ids(system, sibling):
    inputs = model_inputs([sample(system, 1)])
    expected = sibling(**inputs).logits
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = sibling.get_input_embeddings()(ids)
    torch.testing.assert_close(sibling(**inputs).logits, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_encoded_images_in_place_of_pixels(system, sibling):
    inputs = model_inputs([sample(system, 2)])
    expected = sibling(**inputs).logits
    views = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes", "num_views")}
    encoded = {"image": sibling.get_image_features(**views)}
    assert torch.equal(sibling(**inputs, mm_encoder_outputs=encoded).logits, expected)


def test_every_parameter_learns_and_the_stored_positions_do_not(system, sibling_folder):
    model = AutoModelForImageTextToText.from_pretrained(sibling_folder).train()
    getattr(model, f"{CHECKPOINTING}_enable")()
    model.config.text_config.use_cache = False
    inputs = model_inputs([sample(system, 2)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == system.placeholder_id, -100)
    model(**inputs, labels=labels).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    stored = {name for name, _ in model.named_buffers()} & set(model.state_dict())
    assert stored == (set() if system.name == "visualcla" else {"resampler.pos_embed"})


@torch.no_grad()
def test_loss_is_cross_entropy_of_the_next_token(system, sibling):
    inputs = model_inputs([sample(system, 1)])
    outputs = sibling(**inputs, labels=inputs["input_ids"])
    expected = nn.functional.cross_entropy(outputs.logits[0, :-1], inputs["input_ids"][0, 1:])
    torch.testing.assert_close(outputs.loss, expected)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_placeholders_and_views_must_match(system, sibling):
    inputs = model_inputs([sample(system, 2)])
    inputs["input_ids"][inputs["input_ids"] == system.placeholder_id] = 5
    with pytest.raises(ValueError, match=f"tokens: 0, features: {2 * system.num_queries}"):
        sibling(**inputs)


def test_sizes_must_match_the_views(system, sibling):
    inputs = model_inputs([sample(system, 2)])
    inputs["image_sizes"] = inputs["image_sizes"][:1]
    with pytest.raises(ValueError, match="2 views, but 1 image_sizes"):
        sibling(**inputs)


def test_square_resampler_refuses_other_grids(system, sibling):
    if sibling.config.resampler_config.key_positions != "interpolated":
        pytest.skip("takes any grid, or has a tower of one size")
    with pytest.raises(ValueError, match="square images only, got 2 x 3 patches"):
        sibling.get_image_features(torch.zeros(1, 3, 28, 42))
