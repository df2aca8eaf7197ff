"""diffusers' own test mixins on our pipelines. `run_diffusers.py` puts its folder `tests` on the path."""

from types import SimpleNamespace

import diffusers.pipelines
import pytest
import torch
from paint_support import components
from PIL import Image
from tests.pipelines.pipeline_params import (
    IMAGE_TO_IMAGE_IMAGE_PARAMS,
    TEXT_GUIDED_IMAGE_INPAINTING_PARAMS,
    TEXT_GUIDED_IMAGE_VARIATION_PARAMS,
    TEXT_TO_IMAGE_BATCH_PARAMS,
    TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS,
    TEXT_TO_IMAGE_PARAMS,
)
from tests.pipelines.testing_utils import (
    BasePipelineTesterConfig,
    LoraMemoryTesterMixin,
    LoraTesterMixin,
    MemoryTesterMixin,
    PipelineTesterMixin,
    UNetLoraTesterMixin,
    lora,
)

from viscpm_hf import VisCPMPaintImg2ImgPipeline, VisCPMPaintInpaintPipeline, VisCPMPaintPipeline


lora.TEXT_ENCODER_TARGET_MODULES["viscpm_paint_text_encoder"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
# One test reads the source of `encode_prompt` by way of this module.
for pipeline_class in (VisCPMPaintPipeline, VisCPMPaintImg2ImgPipeline, VisCPMPaintInpaintPipeline):
    setattr(diffusers.pipelines, pipeline_class.__name__, pipeline_class)
OPTIONAL = dict.fromkeys(VisCPMPaintPipeline._optional_components)


class TextToImageConfig(BasePipelineTesterConfig):
    pipeline_class = VisCPMPaintPipeline
    required_input_params_in_call_signature = TEXT_TO_IMAGE_PARAMS
    batch_input_params = TEXT_TO_IMAGE_BATCH_PARAMS
    callback_cfg_params = TEXT_TO_IMAGE_CALLBACK_CFG_PARAMS
    output_shape = (3, 16, 16)

    def get_dummy_components(self):
        return {**components(), **OPTIONAL}

    def get_dummy_inputs(self):
        return {
            "prompt": "A painting of a squirrel eating a burger",
            "generator": self.get_generator(0),
            "num_inference_steps": 2,
            "guidance_scale": 5.0,
            "output_type": "pt",
        }


class ImageToImageConfig(TextToImageConfig):
    pipeline_class = VisCPMPaintImg2ImgPipeline
    required_input_params_in_call_signature = TEXT_GUIDED_IMAGE_VARIATION_PARAMS - {"height", "width"}
    batch_input_params = TEXT_TO_IMAGE_BATCH_PARAMS | IMAGE_TO_IMAGE_IMAGE_PARAMS

    def get_dummy_inputs(self):
        pixels = torch.rand(1, 3, 16, 16, generator=self.get_generator(1))
        return {**super().get_dummy_inputs(), "image": pixels, "strength": 0.75}


class InpaintConfig(TextToImageConfig):
    pipeline_class = VisCPMPaintInpaintPipeline
    required_input_params_in_call_signature = TEXT_GUIDED_IMAGE_INPAINTING_PARAMS

    def get_dummy_inputs(self):
        mask = Image.new("L", (16, 16))
        mask.paste(255, (0, 0, 8, 16))
        image = Image.effect_mandelbrot((16, 16), (-2, -1.5, 1, 1.5), 50).convert("RGB")
        return {**super().get_dummy_inputs(), "image": image, "mask_image": mask}


class TestVisCPMPaint(TextToImageConfig, PipelineTesterMixin):
    pass


class TestVisCPMPaintMemory(TextToImageConfig, MemoryTesterMixin):
    pass


class TestVisCPMPaintLora(TextToImageConfig, LoraTesterMixin):
    def get_dummy_components(self):
        parts = super().get_dummy_components()
        # One test looks into the text encoder, at the place where CLIP's layers are.
        parts["text_encoder"].text_model = SimpleNamespace(encoder=parts["text_encoder"].model)
        return parts

    def test_simple_inference_with_partial_text_lora(self):
        pytest.skip("leaves out the LoRA of `encoder.layers.4`, a name that CPM-Bee's layers don't have")


class TestVisCPMPaintLoraMemory(TextToImageConfig, LoraMemoryTesterMixin):
    pass


class TestVisCPMPaintUNetLora(TextToImageConfig, UNetLoraTesterMixin):
    pass


class TestVisCPMPaintImg2Img(ImageToImageConfig, PipelineTesterMixin):
    pass


class TestVisCPMPaintInpaint(InpaintConfig, PipelineTesterMixin):
    pass


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
