"""ControlNets of Stable Diffusion 2.1, a small random one, against diffusers' own pipeline for them."""

import numpy as np
import paint_support
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    ControlNetModel,
    DiffusionPipeline,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
)

from viscpm_hf import VisCPMPaintControlNetPipeline, VisCPMPaintPipeline


PROMPT, OTHER = "人闲桂花落", "a red circle and more 🙂"
QUICK = {"num_inference_steps": 4, "output_type": "pt"}
EDGES = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))


def make_controlnet(unet, seed):
    """One whose last convolutions aren't zeros, as they are before training."""
    torch.manual_seed(seed)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).eval()
    for convolution in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(convolution.weight, std=0.2)
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.2)
    return controlnet


@pytest.fixture(scope="module")
def text_to_image():
    return VisCPMPaintPipeline(**paint_support.components())


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(text_to_image):
    controlnet = make_controlnet(text_to_image.unet, 1)
    return quiet(VisCPMPaintControlNetPipeline.from_pipe(text_to_image, controlnet=controlnet))


@pytest.fixture(scope="module")
def double(text_to_image):
    controlnets = [make_controlnet(text_to_image.unet, seed) for seed in (1, 2)]
    return quiet(VisCPMPaintControlNetPipeline.from_pipe(text_to_image, controlnet=controlnets))


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guess_mode": True},
        {"controlnet_conditioning_scale": 0.4},
        {"control_guidance_start": 0.3, "control_guidance_end": 0.8},
        {"guidance_scale": 1.0},
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_images_are_those_of_diffusers(pipe, double, options, number):
    ours = pipe if number == 1 else double
    names = ("vae", "unet", "controlnet", "scheduler")
    theirs = quiet(
        StableDiffusionControlNetPipeline(
            **{name: getattr(ours, name) for name in names},
            text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )
    )  # fmt: skip
    # Equally long: there the UNet sees no padding.
    pair = ours.encode_prompt(PROMPT, negative_prompt=PROMPT[::-1])
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pair, strict=True))
    image = EDGES if number == 1 else [EDGES, EDGES.rotate(180)]
    arguments = {**embeds, "image": image, "num_images_per_prompt": 2, **QUICK, **options}
    close(ours(**arguments, generator=seeded(0)).images, theirs(**arguments, generator=seeded(0)).images)


def test_it_acts_and_at_scale_zero_does_not(pipe, text_to_image):
    images = {
        scale: pipe(PROMPT, EDGES, controlnet_conditioning_scale=scale, generator=seeded(0), **QUICK).images
        for scale in (0.0, 1.0)
    }
    expected = quiet(text_to_image)(PROMPT, height=16, width=24, generator=seeded(0), **QUICK).images
    close(images[0.0], expected)
    assert (images[1.0] - expected).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"guess_mode": True}])
def test_a_batch_is_its_prompts_one_by_one(pipe, options):
    """Of different lengths: what pads the shorter one is hidden from the ControlNet too."""
    edges = [EDGES, EDGES.rotate(180)]
    together = pipe([PROMPT, OTHER], edges, generator=seeded(1, 2), **QUICK, **options).images
    for index, prompt in enumerate((PROMPT, OTHER)):
        alone = pipe(prompt, edges[index], generator=seeded(index + 1), **QUICK, **options).images
        close(together[index : index + 1], alone)


def test_control_images_of_every_kind(pipe):
    array = np.asarray(EDGES)
    kinds = [EDGES, array, torch.from_numpy(array / np.float32(255)).permute(2, 0, 1)[None], EDGES.convert("RGBA")]
    images = [pipe(PROMPT, kind, generator=seeded(0), **QUICK).images for kind in kinds]
    for image in images[1:]:
        close(image, images[0])


def test_from_pipe_and_auto_pipelines(pipe, text_to_image):
    assert pipe.unet is text_to_image.unet
    back = VisCPMPaintPipeline.from_pipe(pipe)
    assert type(back) is VisCPMPaintPipeline and "controlnet" not in back.components
    auto = AutoPipelineForText2Image.from_pipe(text_to_image, controlnet=pipe.controlnet)
    assert type(auto) is VisCPMPaintControlNetPipeline
    assert type(AutoPipelineForText2Image.from_pipe(auto, controlnet=None)) is VisCPMPaintPipeline


def test_saved_is_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is VisCPMPaintControlNetPipeline
    images = [each(PROMPT, EDGES, generator=seeded(0), **QUICK).images for each in (pipe, loaded)]
    close(*images)


def test_a_controlnet_of_another_unet(text_to_image):
    with pytest.raises(ValueError, match="cross_attention_dim is 768, but the UNet's 24: .*2.1 fit"):
        config = {**ControlNetModel.from_unet(text_to_image.unet).config, "cross_attention_dim": 768}
        VisCPMPaintControlNetPipeline.from_pipe(text_to_image, controlnet=ControlNetModel.from_config(config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "`image` input cannot be undefined"),
        ({"image": torch.rand(1, 5, 16, 16)}, "1, 3 or 4 channels"),
        ({"image": [EDGES, EDGES]}, "2 images can't be shared out to 1 results"),
        ({"controlnet_conditioning_scale": [1.0, 2.0]}, "`controlnet_conditioning_scale` has to be a number"),
        ({"controlnet_conditioning_scale": float("nan")}, "`controlnet_conditioning_scale` has to be a number"),
        ({"control_guidance_start": 0.8, "control_guidance_end": 0.3}, "acts from 0.8 to 0.3"),
    ],
)
def test_what_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPT, "image": EDGES, **QUICK, **arguments})


def test_several_controlnets_want_several_images(double):
    assert isinstance(double.controlnet, MultiControlNetModel)
    with pytest.raises(ValueError, match="a list of 2, one for each ControlNet"):
        double(PROMPT, EDGES, **QUICK)


@pytest.mark.parametrize("what", ["load_ip_adapter", "load_textual_inversion"])
def test_what_belongs_to_clip_is_refused_by_name(pipe, what):
    with pytest.raises(NotImplementedError, match="CLIP"):
        getattr(pipe, what)("somewhere/adapter")


def test_t2i_adapters_are_refused_by_name(text_to_image):
    with pytest.raises(NotImplementedError, match="T2I-Adapter"):
        VisCPMPaintPipeline.from_pipe(text_to_image, adapter=object())
