"""LoRA files of others: what fits acts exactly, what is for CLIP is skipped, and an error leaves nothing behind."""

import paint_support
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import save_file

from viscpm_hf import VisCPMPaintPipeline


QUICK = {"num_inference_steps": 2, "output_type": "pt"}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture
def pipe():
    pipe = VisCPMPaintPipeline(**paint_support.components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt="蓝色"):
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **QUICK).images


def factors(unet):
    """`{layer: (down, up, alpha)}` of every attention product, feed-forward layer and residual convolution."""
    torch.manual_seed(5)
    found = {}
    for number, (name, module) in enumerate(unet.named_modules()):
        rank, alpha = 2 + number % 2, float(1 + number % 3)  # not the same everywhere
        if isinstance(module, torch.nn.Linear) and (name.endswith(ATTENTION) or "ff.net" in name):
            down, up = torch.randn(rank, module.in_features), torch.randn(module.out_features, rank)
        elif isinstance(module, torch.nn.Conv2d) and name.endswith(("conv1", "conv2")):
            down = torch.randn(rank, module.in_channels, *module.kernel_size)
            up = torch.randn(module.out_channels, rank, 1, 1)
        else:
            continue
        found[name] = (down * 0.1, up * 0.1, alpha)
    return found


def kohya(layers, prefix="lora_unet_"):
    file = {}
    for name, (down, up, alpha) in layers.items():
        key = prefix + name.replace(".", "_")
        file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return file


def clip(prefix="lora_te_", width=1024):
    names = [f"text_model.encoder.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkv"]
    return kohya({name: (torch.randn(2, width), torch.randn(width, 2), 2.0) for name in names}, prefix)


def add_to_weights(unet, layers):
    with torch.no_grad():
        for name, (down, up, alpha) in layers.items():
            product = torch.einsum("or,ri...->oi...", up.reshape(len(up), -1), down)
            unet.get_submodule(name).weight += product * (alpha / len(down))


@pytest.mark.parametrize("source", ["tensors", "file"])
def test_kohyas_file_acts_as_its_products_on_the_weights(pipe, source, tmp_path, caplog):
    layers = factors(pipe.unet)
    lora = {**kohya(layers), **clip()}
    plain = draw(pipe)
    if source == "file":
        save_file(lora, tmp_path / "style.safetensors")
        lora = tmp_path / "style.safetensors"
    pipe.load_lora_weights(lora, adapter_name="style")
    assert "12 of the LoRA's" in caplog.text and "are for CLIP" in caplog.text
    actual = draw(pipe)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), plain, rtol=0, atol=1e-6)
    add_to_weights(pipe.unet, layers)
    torch.testing.assert_close(actual, draw(pipe), rtol=0, atol=1e-5)
    assert (actual - plain).abs().max() > 0.01


@pytest.mark.parametrize("style", ["peft", "lora.down", "processor"])
def test_diffusers_keys(pipe, style):
    layers = {name: factor for name, factor in factors(pipe.unet).items() if name.endswith(("to_q", "to_out.0"))}
    names = {
        "peft": lambda name: [f"{name}.lora_A.weight", f"{name}.lora_B.weight"],
        "lora.down": lambda name: [f"{name}.lora.down.weight", f"{name}.lora.up.weight"],
        "processor": lambda name: [
            f"{name.replace('attn1.', 'attn1.processor.').replace('attn2.', 'attn2.processor.').removesuffix('.0')}"
            f"_lora.{part}.weight"
            for part in ("down", "up")
        ],
    }[style]
    lora = {
        f"unet.{key}": value for name, pair in layers.items() for key, value in zip(names(name), pair, strict=False)
    }
    lora["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight"] = torch.ones(2, 8)
    lora["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight"] = torch.ones(8, 2)
    pipe.load_lora_weights(lora)
    actual = draw(pipe)
    pipe.unload_lora_weights()
    add_to_weights(pipe.unet, {name: (down, up, float(len(down))) for name, (down, up, _) in layers.items()})
    torch.testing.assert_close(actual, draw(pipe), rtol=0, atol=1e-5)


def own_half(pipe):
    layers = [name for name, _ in pipe.text_encoder.named_modules() if name.endswith("q_proj")]
    lora = {}
    for name in layers:
        module = pipe.text_encoder.get_submodule(name)
        lora[f"text_encoder.{name}.lora_A.weight"] = torch.randn(2, module.in_features)
        lora[f"text_encoder.{name}.lora_B.weight"] = torch.randn(module.out_features, 2)
    return lora


def test_both_halves_of_our_own(pipe):
    plain = draw(pipe)
    lora = {f"unet.{key}": value for key, value in {"conv_in.lora_A.weight": torch.randn(2, 4, 3, 3)}.items()}
    lora["unet.conv_in.lora_B.weight"] = torch.randn(pipe.unet.conv_in.out_channels, 2, 1, 1)
    pipe.load_lora_weights({**lora, **own_half(pipe)}, adapter_name="both")
    assert pipe.get_list_adapters() == {"unet": ["both"], "text_encoder": ["both"]}
    assert (draw(pipe) - plain).abs().max() > 1e-3


def freed(pipe, lora):
    pipe.free_text_encoder()
    return lora


MIDDLE = "mid_block.attentions.0.transformer_blocks.0"
FOREIGN = {
    "Stable Diffusion 1": (
        lambda pipe: kohya({f"{MIDDLE}.attn2.to_k": (torch.ones(2, 768), torch.ones(64, 2), 1.0)}),
        "with 768 inputs, where the layer has 24 .*made for Stable Diffusion 1.*Nothing was loaded",
    ),
    "other blocks": (
        lambda pipe: kohya({"down_blocks.7.attentions.0.to_q": (torch.ones(2, 64), torch.ones(64, 2), 1.0)}),
        "a layer down_blocks.7.attentions.0.to_q, which there is not",
    ),
    "CLIP alone": (lambda pipe: clip(), "18 tensors are all for CLIP|12 tensors are all for CLIP"),
    "another encoder": (
        lambda pipe: {"text_encoder.layers.0.q.lora_A.weight": torch.ones(2, 8)},
        "for a layer layers.0.q, which there is not",
    ),
    "a second encoder": (
        lambda pipe: {**kohya(factors(pipe.unet)), **clip("lora_te2_")},
        "for neither the UNet nor the text encoder",
    ),
    "bare keys": (lambda pipe: {"mid_block.to_q.lora_A.weight": torch.ones(2, 8)}, "for neither the UNet nor"),
    "no LoRA": (lambda pipe: dict(pipe.unet.state_dict()), "for neither the UNet nor"),
    "LoHa": (lambda pipe: {"lora_unet_mid_block.hada_w1_a": torch.ones(2, 2)}, "no LoRA but LoHa"),
    "ranks that differ": (
        lambda pipe: {
            "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
            "unet.conv_in.lora_B.weight": torch.ones(32, 3, 1, 1),
        },
        "size mismatch",
    ),
    "ours, after freeing": (lambda pipe: freed(pipe, own_half(pipe)), "load the LoRA before free_text_encoder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_does_not_fit_leaves_nothing_behind(pipe, kind, tmp_path):
    make, message = FOREIGN[kind]
    before = draw(pipe)
    prompt_embeds, negative = pipe.encode_prompt("蓝色")
    lora = make(pipe)
    names = list(pipe.unet.state_dict())
    with pytest.raises((ValueError, RuntimeError), match=message):
        pipe.load_lora_weights(lora, adapter_name="style")
    assert list(pipe.unet.state_dict()) == names  # nothing wrapped, nothing added
    generator = torch.Generator().manual_seed(0)
    embeds = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative}
    assert torch.equal(pipe(**embeds, generator=generator, **QUICK).images, before)


def test_a_file_without_layers_changes_nothing(pipe, caplog):
    """As in diffusers, whose own suite wants it: a warning."""
    before = draw(pipe)
    pipe.load_lora_weights({"lora_foo": torch.tensor(2.0), "lora_bar": torch.tensor(3.0)})
    assert "2 tensors are of no layer" in caplog.text
    assert torch.equal(draw(pipe), before)


def test_an_error_in_the_second_half_takes_back_the_first(pipe, monkeypatch):
    before, lora = draw(pipe), {**kohya(factors(pipe.unet)), **clip()}
    pipe.load_lora_weights(lora, adapter_name="first")
    first = draw(pipe)
    paint_support.add_adapter(pipe.text_encoder, LoraConfig(r=2, target_modules=["q_proj"]), "second")
    half = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(32, 2, 1, 1),
    }
    with pytest.raises(ValueError, match="second"):
        pipe.load_lora_weights({**half, **own_half(pipe)}, adapter_name="second")
    assert pipe.get_list_adapters()["unet"] == ["first"]
    torch.testing.assert_close(draw(pipe), first, rtol=0, atol=1e-6)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=1e-6)


def test_after_freeing_the_encoder_the_unets_half_loads(pipe):
    embeds, _ = pipe.encode_prompt("蓝色")
    lora = {**kohya(factors(pipe.unet)), **clip()}
    pipe.free_text_encoder()
    before = pipe(prompt_embeds=embeds, generator=torch.Generator().manual_seed(0), **QUICK).images
    pipe.load_lora_weights(lora)
    after = pipe(prompt_embeds=embeds, generator=torch.Generator().manual_seed(0), **QUICK).images
    assert (after - before).abs().max() > 0.01


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
@pytest.mark.parametrize("state", ["loaded", "fused", "deleted"])
def test_a_lora_in_a_saved_model(pipe, part, state, tmp_path):
    """Saved with it, the folder couldn't be loaded back; it says what to do, and that works."""
    layers = {"text_encoder": ["q_proj"], "unet": ["to_q"]}[part]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=layers, init_lora_weights=False)
    paint_support.add_adapter(getattr(pipe, part), config, "style")
    if state == "fused":
        pipe.fuse_lora(components=[part])
    if state == "deleted":
        pipe.delete_adapters("style")
    expected = draw(pipe)
    with pytest.raises(ValueError, match=f"The {part} has a LoRA .*fuse_lora\\(\\) followed by unload_lora_weights"):
        pipe.save_pretrained(tmp_path)
    if state == "loaded":
        pipe.fuse_lora(components=[part])
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(loaded), expected, rtol=0, atol=1e-5)
