"""Device maps, offloading, weights in 8 and 4 bits, LoRA: on the siblings as on any model."""

import pytest
import torch
from reference import minicpmv, write_visualcla_release
from reference import visualcla as small_visualcla
from sibling_inputs import model_inputs, sample
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from viscpm_hf.loading.quantization import quantization_config
from viscpm_hf.modeling.packed_linear import PackedLinear


def load(folder, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs).eval()


@torch.no_grad()
@pytest.mark.parametrize("where", ["cpu", "parts", "disk"])
def test_device_map_changes_nothing(system, sibling, sibling_folder, tmp_path, where):
    """What is on the disk comes into memory for its turn alone."""
    device_map = {
        "cpu": "cpu",
        "parts": {"vision_tower": "cpu", "resampler": "cpu", "language_model": "cpu"},
        "disk": {
            "vision_tower": "disk",
            "resampler": "disk",
            "language_model.model": "disk",
            "language_model.lm_head": "cpu",
        },
    }[where]
    model = load(sibling_folder, device_map=device_map, offload_folder=tmp_path)
    if where == "disk":
        assert any(parameter.is_meta for parameter in model.parameters())
    inputs = model_inputs([sample(system, 2), sample(system, 1, seed=1)])
    assert torch.equal(model(**inputs).logits, sibling(**inputs).logits)
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=4, num_beams=2),
        sibling.generate(**inputs, max_new_tokens=4, num_beams=2),
    )


def test_device_map_that_names_no_part(sibling_folder):
    with pytest.raises(ValueError, match="vision_model.*its parts are vision_tower, resampler, language_model"):
        load(sibling_folder, device_map={"vision_model": "cpu", "": "cpu"})


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@torch.no_grad()
def test_language_model_alone_is_quantised(system, sibling, sibling_folder, tmp_path, bits):
    if bits == "4bit":
        # Widths of 96 are no multiple of a block.
        config = quantization_config(bits, torch.float32)
        config.modules_to_not_convert += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    else:
        config = quantization_config(bits, torch.float32)
    model = load(sibling_folder, quantization_config=config, device_map="cpu")
    quantised = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert quantised and all(name.startswith("language_model.model.layers.") for name in quantised)
    inputs = model_inputs([sample(system, 2)])
    logits, expected = model(**inputs).logits, sibling(**inputs).logits
    similarity = nn.functional.cosine_similarity(logits.flatten(), expected.flatten(), dim=0)
    assert similarity > {"8bit": 0.98, "4bit": 0.95}[bits]
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path).eval()(**inputs).logits, logits, atol=1e-3, rtol=0)


def test_quantisation_of_a_users_own_keeps_the_resampler(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = load(minicpmv().write(tmp_path), quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert type(model.resampler.attn.q_proj) is nn.Linear
    assert type(model.vision_tower.encoder.layers[0].mlp.fc1) is nn.Linear
    assert type(model.language_model.lm_head) is nn.Linear
    assert type(model.language_model.model.layers[0].mlp.gate_proj) is not nn.Linear


def test_lora_learns(system, sibling_folder):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = load(sibling_folder)
    targets = r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    inputs = model_inputs([sample(system, 2)])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == system.placeholder_id, -100)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@torch.no_grad()
def test_adapter_is_quantised_with_its_bases(tmp_path):
    pytest.importorskip("bitsandbytes")
    system = small_visualcla()
    release = write_visualcla_release(system, tmp_path)
    model = load(
        release.adapter,
        text_model=release.text_model,
        vision_model=release.vision_model,
        quantization_config=quantization_config("8bit", torch.float32),
        device_map="cpu",
    )
    prompt = sample(system, 1)
    logits = model(**model_inputs([prompt])).logits[0]
    expected = system.logits(prompt.ids, prompt.views)
    assert nn.functional.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.98
