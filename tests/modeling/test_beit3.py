"""The vision tower against the reference, and every capability that it declares."""

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from transformers.utils import is_flash_attn_2_available

from viscpm_hf.modeling.compatibility import CHECKPOINTING
from viscpm_hf.modeling.configuration_beit3 import Beit3Config
from viscpm_hf.modeling.modeling_beit3 import Beit3Model


GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("chat_a", "chat_b")
RAW_PARAMETERS = {"embeddings.cls_token", "embeddings.query_tokens"}  # parameters outside nn modules of torch

# Names in the original files -> ours; everything else of `vpm` (text_embed, mask_token, mim_head) is training only.
RENAMES = (
    (r"^query$", "embeddings.query_tokens"),
    (r"^vpm\.beit3\.vision_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^vpm\.beit3\.vision_embed\.cls_token$", "embeddings.cls_token"),
    (r"^vpm\.beit3\.encoder\.embed_positions\.A\.", "embeddings.image_position_embedding."),
    (r"^vpm\.beit3\.encoder\.embed_positions\.B\.", "embeddings.query_position_embedding."),
    (r"^vpm\.beit3\.encoder\.", ""),
    (r"\.(q|k|v|out)_proj\.", r".\1_experts."),
    (r"\.inner_attn_ln\.", ".inner_layer_norm."),
    (r"\.ffn\.", ".mlp."),
    (r"\.ffn_layernorm\.", ".layer_norm."),
    (r"(^|\.)A(\.)", r"\1image\2"),
    (r"(^|\.)B(\.)", r"\1query\2"),
)


def original_to_new(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state_dict.items():
        if name.endswith(("text_embed.weight", "mask_token")) or not re.match(r"query$|vpm\.beit3\.", name):
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def load_tower(case: str, **kwargs) -> Beit3Model:
    sizes = json.loads((GOLDEN / case / "vision.json").read_text())
    weights = original_to_new(torch.load(GOLDEN / case / "pytorch_model.bin", weights_only=True))
    config = Beit3Config(
        hidden_size=sizes["vision_dim"],
        intermediate_size=sizes["vision_ffn"],
        num_hidden_layers=sizes["vision_layers"],
        num_attention_heads=sizes["vision_heads"],
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        num_query_tokens=sizes["query_num"],
        max_query_positions=weights["embeddings.query_position_embedding.weight"].shape[0],
        **kwargs,
    )
    model = Beit3Model(config).eval()
    model.load_state_dict(weights, strict=True)
    return model


def load_expected(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    expected = load_file(GOLDEN / case / "expected.safetensors")
    pixel_values = torch.stack([expected[f"image_{i}.pixel_values"] for i in range(3)])
    return pixel_values, torch.cat([expected[f"image_{i}.vision_tower"] for i in range(3)])


def small_config(**kwargs) -> Beit3Config:
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_query_tokens=5,
        max_query_positions=9,
        initializer_range=0.2,
    )
    return Beit3Config(**(sizes | kwargs))


@pytest.fixture
def model() -> Beit3Model:
    torch.manual_seed(0)
    return Beit3Model(small_config()).eval()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_the_reference(case, attn_implementation):
    model = load_tower(case)
    model.set_attn_implementation(attn_implementation)
    pixel_values, expected = load_expected(case)
    outputs = model(pixel_values)
    assert outputs.pooler_output is None
    torch.testing.assert_close(outputs.last_hidden_state, expected, atol=1e-5, rtol=0)


def test_default_config_is_the_released_tower():
    """The parameters of the 10B release, counted from the shapes in its file: 0.61 of 0.68 billion are used."""
    with torch.device("meta"):
        model = Beit3Model(Beit3Config())
    hidden, inner, layers = 1024, 4096, 24
    layer_norm = 2 * hidden
    attention = 4 * (hidden * hidden + hidden) + layer_norm  # q, k, v, out and the inner norm
    feed_forward = (inner * hidden + inner) + 2 * inner + (hidden * inner + hidden)
    expert = attention + feed_forward + 2 * layer_norm
    patch_embedding = hidden * 3 * 16 * 16 + hidden
    embeddings = 64 * hidden + patch_embedding + hidden + 199 * hidden + 1024 * hidden
    expected = embeddings + layers * 2 * expert + 2 * layer_norm
    assert expected == 607_220_736
    assert sum(parameter.numel() for parameter in model.parameters()) == expected

    unused = 64010 * hidden + hidden + (8192 * hidden + 8192)  # text_embed, mask_token, mim_head
    assert round((expected + unused) / 1e9, 2) == 0.68
    assert model.embeddings.image_position_embedding.weight.shape == (199, 1024)


@torch.no_grad()
def test_matches_a_direct_formula(model, pixel_values):
    """Every token through its expert in every layer, the last included: skipping its image rows changes nothing."""
    config, heads = model.config, model.config.num_attention_heads
    embeddings = model.embeddings
    patches = embeddings.patch_embedding(pixel_values).flatten(2).mT
    image = torch.cat([embeddings.cls_token.expand(3, -1, -1), patches], dim=1)
    image = image + embeddings.image_position_embedding.weight[2:]
    query = embeddings.query_tokens + embeddings.query_position_embedding.weight[2 : 2 + config.num_query_tokens]
    states = torch.cat([image, query.expand(3, -1, -1)], dim=1)
    is_query = torch.arange(states.shape[1]) >= image.shape[1]

    def multiway(module, states):
        return torch.where(is_query[:, None], module.query(states), module.image(states))

    for layer in model.layers:
        attention = layer.self_attn
        normed = multiway(layer.self_attn_layer_norm, states)
        q, k, v = (
            multiway(proj, normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for proj in (attention.q_experts, attention.k_experts, attention.v_experts)
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        states = states + multiway(attention.out_experts, multiway(attention.inner_layer_norm, attended))
        normed = multiway(layer.final_layer_norm, states)
        inner = torch.where(is_query[:, None], layer.mlp.query.fc1(normed), layer.mlp.image.fc1(normed))
        inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
        states = states + torch.where(
            is_query[:, None],
            layer.mlp.query.fc2(layer.mlp.query.layer_norm(inner)),
            layer.mlp.image.fc2(layer.mlp.image.layer_norm(inner)),
        )
    expected = multiway(model.layer_norm, states)[:, is_query]
    torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_attention_implementations_agree(model, pixel_values):
    model.set_attn_implementation("eager")
    expected = model(pixel_values).last_hidden_state
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_flex_attention_agrees(model, pixel_values):
    expected = model(pixel_values).last_hidden_state
    model.set_attn_implementation("flex_attention")
    try:
        outputs = model(pixel_values)
    except Exception as error:  # on the CPU it needs a C++ compiler
        if type(error).__module__.startswith("torch._"):
            pytest.skip(f"flex attention can't be compiled here: {type(error).__name__}")
        raise
    torch.testing.assert_close(outputs.last_hidden_state, expected, atol=1e-5, rtol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not (torch.cuda.is_available() and is_flash_attn_2_available()), reason="needs flash-attn")
@torch.no_grad()
def test_flash_attention_agrees(pixel_values):
    model = Beit3Model(small_config()).to("cuda", torch.bfloat16).eval()
    pixel_values = pixel_values.to("cuda")
    expected = model(pixel_values).last_hidden_state
    model.set_attn_implementation("flash_attention_2")
    torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, atol=5e-2, rtol=5e-2)


@torch.no_grad()
def test_batch_equals_single_images(model, pixel_values):
    batch = model(pixel_values).last_hidden_state
    single = torch.cat([model(image[None]).last_hidden_state for image in pixel_values])
    assert batch.shape == (3, 5, 32)
    torch.testing.assert_close(batch, single, atol=1e-5, rtol=0)


@torch.no_grad()
def test_saved_equals_loaded(model, pixel_values, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, info = Beit3Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(loaded(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)


def test_every_parameter_is_initialised_when_missing(model, tmp_path):
    """Models are built on the meta device while loading: a raw parameter nobody initialises would hold garbage."""
    state_dict = {k: v for k, v in model.state_dict().items() if k not in RAW_PARAMETERS}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    loaded, info = Beit3Model.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == RAW_PARAMETERS
    for name in RAW_PARAMETERS:
        assert 0.1 < loaded.get_parameter(name).std().item() < 0.3


@torch.no_grad()
def test_hidden_states_and_attentions(model, pixel_values):
    model.set_attn_implementation("eager")
    outputs = model(pixel_values, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(3, 22, 32)] * 3 + [(3, 5, 32)]
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert [tuple(a.shape) for a in outputs.attentions] == [(3, 2, 22, 22)] * 2 + [(3, 2, 5, 22)]
    for attention in outputs.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    as_tuple = model(pixel_values, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.last_hidden_state)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, pixel_values, use_reentrant):
    def gradients():
        model.zero_grad()
        model(pixel_values).last_hidden_state.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    expected = gradients()
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": use_reentrant})
    assert getattr(model, f"is_{CHECKPOINTING}")
    checkpointed = gradients()
    assert checkpointed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-5, rtol=1e-5)


def test_only_the_skipped_half_of_the_last_layer_gets_no_gradient(model, pixel_values):
    model(pixel_values).last_hidden_state.sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    last_layer = r"layers\.2\.(self_attn\.(q_experts|out_experts|inner_layer_norm)|mlp|final_layer_norm)\.image\."
    skipped = rf"{last_layer}|layer_norm\.image\."
    expected = {name for name, _ in model.named_parameters() if re.match(skipped, name)}
    assert without == expected and len(expected) == 16


@torch.no_grad()
def test_interpolation_equals_resized_positions(model):
    """At 24 × 16 pixels the model is one whose position table holds the resized positions."""
    pixel_values = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(2))
    outputs = model(pixel_values, interpolate_pos_encoding=True)

    embeddings = model.embeddings
    grid = embeddings.image_position_embedding.weight[3:].T.reshape(1, 32, 4, 4)
    grid = torch.nn.functional.interpolate(grid, size=(6, 4), mode="bicubic", align_corners=False)
    patches = embeddings.patch_embedding(pixel_values).flatten(2).mT + grid.reshape(32, 24).T
    cls_token = embeddings.cls_token + embeddings.image_position_embedding.weight[2]
    states = embeddings(torch.zeros(2, 3, 16, 16))
    expected = torch.cat([cls_token.expand(2, -1, -1), patches, states[:, -5:]], dim=1)
    torch.testing.assert_close(embeddings(pixel_values, interpolate_pos_encoding=True), expected, atol=1e-5, rtol=0)
    for i, layer in enumerate(model.layers):
        expected = layer(expected, 25, i == 2)
    torch.testing.assert_close(outputs.last_hidden_state, model.layer_norm.query(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_interpolation_leaves_the_own_size_alone(model, pixel_values):
    outputs = model(pixel_values, interpolate_pos_encoding=True)
    assert torch.equal(outputs.last_hidden_state, model(pixel_values).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(model, pixel_values, dtype):
    expected = model(pixel_values).last_hidden_state
    outputs = model.to(dtype)(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    assert outputs.dtype == dtype
    assert (outputs.float() - expected).abs().mean() < 0.05
    bigger = model(torch.randn(1, 3, 24, 24), interpolate_pos_encoding=True).last_hidden_state
    assert bigger.dtype == dtype and bigger.isfinite().all()


@torch.no_grad()
def test_offloading_leaves_no_weight_behind(model, pixel_values):
    """Hooks bring a module's weights in when it is called: a table read past its module would still be meta."""
    expected = model(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    bigger = torch.ones(1, 3, 24, 24)
    expected_bigger = model(bigger, interpolate_pos_encoding=True).last_hidden_state
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.embeddings.cls_token.device.type == "meta"
    assert torch.equal(model(pixel_values).last_hidden_state, expected)
    assert torch.equal(model(bigger, interpolate_pos_encoding=True).last_hidden_state, expected_bigger)


@torch.no_grad()
def test_compiles_without_graph_breaks(model, pixel_values):
    expected = model(pixel_values).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixel_values).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_input_embeddings_are_the_patches(model):
    assert model.get_input_embeddings() is model.embeddings.patch_embedding


@pytest.mark.parametrize(
    ("shape", "interpolate", "message"),
    [
        ((1, 3, 24, 16), False, "24x16 pixels.*16x16"),
        ((1, 3, 18, 16), True, "18x16 pixels.*patch_size 4"),
        ((1, 1, 16, 16), False, r"\(batch, 3, height, width\).*\(1, 1, 16, 16\)"),
        ((3, 16, 16), False, r"\(batch, 3, height, width\).*\(3, 16, 16\)"),
    ],
)
def test_wrong_images_are_refused(model, shape, interpolate, message):
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape), interpolate_pos_encoding=interpolate)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 225}, "225 .*16"),
        ({"hidden_size": 1000}, "1000 .*16"),
        ({"num_query_tokens": 1023}, "1023 .*1024"),
        ({"patch_size": 0}, "patch_size .*0"),
        ({"num_query_tokens": 0}, "num_query_tokens .*0"),
    ],
)
def test_wrong_configs_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Beit3Config(**kwargs)


def test_config_round_trip(tmp_path):
    config = small_config()
    config.save_pretrained(tmp_path)
    assert Beit3Config.from_pretrained(tmp_path).to_dict() == config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "a_vlm", "vision_config": config.to_dict()}))
    assert Beit3Config.from_pretrained(tmp_path).hidden_size == 32  # out of a composite config
