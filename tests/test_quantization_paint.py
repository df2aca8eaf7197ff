"""VisCPM-Paint with its text encoder, and on request its UNet, in 8 and 4 bits."""

import pytest
import quantization_support
import torch
from diffusers import PipelineQuantizationConfig
from transformers import BitsAndBytesConfig

from viscpm_hf import VisCPMPaint, VisCPMPaintPipeline
from viscpm_hf.loading.quantization import quantization_config


ALONE = {"image_safety_checker": False, "prompt_safety_checker": False, "add_ranker": False, "device": "cpu"}
PROMPT = "一只猫 cat"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return quantization_support.write_paint(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def full(original):
    return VisCPMPaint(original, **ALONE, dtype="float32")


def embeds(pipeline: VisCPMPaintPipeline) -> torch.Tensor:
    return pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)[0].float()


def closeness(pipeline: VisCPMPaintPipeline, full: VisCPMPaint) -> float:
    one, other = embeds(pipeline), embeds(full.pipeline)
    return torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


@pytest.mark.parametrize(("name", "least"), [("8bit", 0.999), ("nf4", 0.96), ("int8wo", 0.999)])
def test_draws(original, full, tmp_path, name, least):
    painter = VisCPMPaint(original, **ALONE, quantization=name)
    pipeline = painter.pipeline
    assert closeness(pipeline, full) >= least
    assert type(pipeline.text_encoder.projection) is torch.nn.Linear
    assert not hasattr(pipeline.unet, "hf_quantizer")
    first = painter.generate(PROMPT, generator=0, num_inference_steps=2)
    pipeline.save_pretrained(tmp_path)
    loaded = VisCPMPaint(tmp_path, **ALONE)
    assert loaded.pipeline.text_encoder.is_quantized
    assert torch.equal(embeds(loaded.pipeline), embeds(pipeline))
    assert loaded.generate(PROMPT, generator=0, num_inference_steps=2).tobytes() == first.tobytes()


def test_a_converted_folder(full, tmp_path):
    full.pipeline.save_pretrained(tmp_path)
    painter = VisCPMPaint(tmp_path, **ALONE, quantization="4bit")
    assert closeness(painter.pipeline, full) >= 0.96


@pytest.mark.parametrize("source", ["original", "converted"])
def test_a_pipeline_quantization_config(original, full, tmp_path, source):
    folder = original.parent
    if source == "converted":
        full.pipeline.save_pretrained(tmp_path)
        folder = tmp_path
    config = PipelineQuantizationConfig(quant_mapping={"text_encoder": BitsAndBytesConfig(load_in_8bit=True)})
    pipeline = VisCPMPaintPipeline.from_pretrained(folder, quantization_config=config)
    assert pipeline.text_encoder.is_quantized
    assert closeness(pipeline, full) >= 0.999


@pytest.mark.parametrize("source", ["original", "converted"])
def test_the_unet_on_request(original, full, tmp_path, source):
    folder = original
    if source == "converted":
        full.pipeline.save_pretrained(tmp_path)
        folder = tmp_path
    painter = VisCPMPaint(folder, **ALONE, quantization="int8wo", quantize_unet=True)
    weight = painter.pipeline.unet.mid_block.attentions[0].proj_in.weight
    assert type(weight.data) is not torch.Tensor
    image = painter.generate(PROMPT, generator=0, num_inference_steps=2)
    assert image.size == full.generate(PROMPT, generator=0, num_inference_steps=2).size


def test_bitsandbytes_quantises_no_unet_on_a_cpu(original):
    with pytest.raises(ValueError, match=r"the UNet with bitsandbytes \(nf4\) on GPUs only: use int8wo"):
        VisCPMPaint(original, **ALONE, quantization="nf4", quantize_unet=True)


def test_the_configuration_is_of_the_text_encoder(original):
    config = PipelineQuantizationConfig(quant_mapping={"text_encoder": quantization_config("nf4", torch.float32)})
    pipeline = VisCPMPaintPipeline.from_pretrained(original.parent, quantization_config=config, dtype=torch.float32)
    stored = pipeline.text_encoder.config.quantization_config
    assert stored.bnb_4bit_quant_type == "nf4" and "projection" in stored.llm_int8_skip_modules
