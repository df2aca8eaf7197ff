"""The pipelines: parity with the reference, what diffusers' users expect, and what is refused."""

import copy
import gc
import inspect
import json
import pickle
import weakref

import diffusers
import numpy as np
import paint_support
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PipelineQuantizationConfig,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from paint_support import CASES, CONFIGS, PAINT, components

from viscpm_hf import (
    OriginalCheckpointError,
    UnsafeImageError,
    UnsafePromptError,
    VisCPMPaintImg2ImgPipeline,
    VisCPMPaintInpaintPipeline,
    VisCPMPaintPipeline,
)
from viscpm_hf.pipelines.pipeline_output import VisCPMPaintPipelineOutput


PROMPT = "人闲桂花落，月静春山空"
OTHER = "a red circle 🙂"
QUICK = {"num_inference_steps": 2, "output_type": "pt"}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def golden():
    return paint_support.expected()


@pytest.fixture(scope="module")
def original():
    """From the original file, as an original folder."""
    return quiet(VisCPMPaintPipeline.from_pretrained(PAINT))


@pytest.fixture(scope="module")
def saved_folder(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "paint"
    original.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(saved_folder):
    """From the saved folder, by diffusers' own class."""
    return quiet(DiffusionPipeline.from_pretrained(saved_folder))


@pytest.fixture
def pipe():
    """With fresh random weights, for tests that change it."""
    return quiet(VisCPMPaintPipeline(**components()))


# -------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("source", ["original", "converted"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_images_are_the_references(request, golden, source, case):
    pipe, arguments = request.getfixturevalue(source), CASES[case]
    assert type(pipe) is VisCPMPaintPipeline
    output = pipe(
        arguments["prompt"],
        negative_prompt=arguments["negative_prompt"],
        latents=golden[f"{case}.latents"],
        generator=seeded(arguments["generator_seed"]),
        output_type="np",
        **arguments["kwargs"],
    )
    close(torch.from_numpy(output.images), golden[f"{case}.image"], atol=1e-4)
    assert torch.equal(pipe.scheduler.timesteps, golden[f"{case}.timesteps"])


@pytest.mark.parametrize("case", range(len(CASES)))
def test_noise_and_embeddings_are_the_references(original, golden, case):
    prompt_embeds, negative_prompt_embeds = original.encode_prompt(
        CASES[case]["prompt"], negative_prompt=CASES[case]["negative_prompt"]
    )
    close(prompt_embeds, golden[f"{case}.cond.prompt_embeds"], atol=1e-4)
    close(negative_prompt_embeds, golden[f"{case}.uncond.prompt_embeds"], atol=1e-4)
    latents = golden[f"{case}.latents"]
    with torch.no_grad():
        noise = original.unet(latents, 501, prompt_embeds.expand(len(latents), -1, -1)).sample
    close(noise, golden[f"{case}.noise_pred_t501"], atol=1e-5)


# --------------------------------------------------------------------------------------------- prompts and their batch


def test_a_batch_is_its_prompts_one_by_one(original):
    """Pairs of different lengths: what a longer one adds is hidden from the UNet."""
    prompts, negatives = [PROMPT, "蓝色", OTHER], ["", "blue square, ~ bad", "a very long negative prompt, longer"]
    together = original(prompts, negative_prompt=negatives, generator=seeded(1, 2, 3), **QUICK).images
    for index, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = original(prompt, negative_prompt=negative, generator=seeded(index + 1), **QUICK).images
        close(together[index : index + 1], alone)


def test_encodings_of_different_lengths_join_by_zeros(original):
    pairs = [original.encode_prompt(prompt) for prompt in (PROMPT, "蓝色")]
    joined = [torch.nn.utils.rnn.pad_sequence([pair[side][0] for pair in pairs], batch_first=True) for side in (0, 1)]
    for side, embeds in enumerate(original.encode_prompt([PROMPT, "蓝色"])):
        close(embeds, joined[side])


def test_embeddings_are_as_good_as_the_prompt(original):
    prompt_embeds, negative_prompt_embeds = original.encode_prompt([PROMPT, "蓝色"], negative_prompt="bad")
    from_embeds = original(
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        generator=seeded(1, 2),
        **QUICK,
    ).images
    from_prompt = original([PROMPT, "蓝色"], negative_prompt="bad", generator=seeded(1, 2), **QUICK).images
    close(from_embeds, from_prompt)


@pytest.mark.parametrize("negative", ["", "a very long negative prompt, longer than the prompt"])
def test_either_side_may_be_embeddings(original, negative):
    expected = original.encode_prompt("蓝色", negative_prompt=negative)
    bare = [original.encode_prompt(text, do_classifier_free_guidance=False)[0] for text in ("蓝色", negative)]
    for actual in (
        original.encode_prompt(None, negative_prompt=negative, prompt_embeds=bare[0]),
        original.encode_prompt("蓝色", negative_prompt_embeds=bare[1]),
    ):
        for side in (0, 1):
            close(actual[side], expected[side])


def test_padding_can_be_hidden(original):
    hidden = quiet(VisCPMPaintPipeline.from_pipe(original, mask_padding=True))
    _, negative = hidden.encode_prompt(PROMPT)
    empty, _ = original.encode_prompt("", do_classifier_free_guidance=False)
    assert not negative[0, empty.shape[1] :].any()
    close(negative[:, : empty.shape[1]], empty)
    assert not torch.allclose(
        hidden(PROMPT, generator=seeded(0), **QUICK).images, original(PROMPT, generator=seeded(0), **QUICK).images
    )


def test_cond_and_uncond_take_one_pass_with_each_text_once(pipe):
    sizes = []
    pipe.text_encoder.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(output.prompt_embeds.shape[0]), with_kwargs=True
    )
    pipe.encode_prompt("蓝色")
    pipe.encode_prompt(["蓝色", "蓝色", "a"], negative_prompt="bad")
    assert sizes == [2, 3]


def lora_on(text_encoder):
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    paint_support.add_adapter(text_encoder, config, "style")


CHANGES = {
    "in place": lambda pipe: pipe.text_encoder.layer_norm.bias.requires_grad_(False).add_(1.0),
    "through .data": lambda pipe: pipe.text_encoder.layer_norm.bias.data.add_(1.0),
    "averages copied": lambda pipe: [weight.data.mul_(1.1) for weight in pipe.text_encoder.parameters()],
    "another tensor": lambda pipe: setattr(pipe.text_encoder.layer_norm.bias, "data", torch.ones(24)),
    "loaded": lambda pipe: lora_on(pipe.text_encoder),
    "fused": lambda pipe: (lora_on(pipe.text_encoder), pipe.fuse_lora(components=["text_encoder"])),
    "unloaded": lambda pipe: (lora_on(pipe.text_encoder), pipe.encode_prompt("a"), pipe.unload_lora_weights()),
    "half": lambda pipe: pipe.text_encoder.to(torch.bfloat16),
    "another encoder": lambda pipe: setattr(pipe, "text_encoder", components(seed=1)["text_encoder"]),
    "freed and replaced": lambda pipe: (
        pipe.free_text_encoder(),
        setattr(pipe, "text_encoder", components(seed=1)["text_encoder"]),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_is_drawn_with(pipe, change):
    """Images after a change of the text encoder are those of a pipeline that never drew anything before."""
    pipe("蓝色", **QUICK)
    CHANGES[change](pipe)
    fresh = quiet(VisCPMPaintPipeline(**pipe.components))
    images = [each("蓝色", generator=seeded(0), **QUICK).images for each in (pipe, fresh)]
    assert torch.equal(*images)


def test_what_a_freed_text_encoder_left_goes_with_it(pipe):
    pipe.free_text_encoder()
    other = quiet(VisCPMPaintPipeline.from_pipe(pipe))
    empty = [each.encode_prompt("", do_classifier_free_guidance=False)[0] for each in (pipe, other)]
    assert torch.equal(*empty)
    other.text_encoder = components(seed=1)["text_encoder"]
    other.text_encoder = None
    with pytest.raises(ValueError, match="no text encoder"):
        other.encode_prompt("", do_classifier_free_guidance=False)


def test_the_text_encoder_can_be_freed(pipe):
    expected = pipe(PROMPT, generator=seeded(0), **QUICK).images
    prompt_embeds, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    encoder = weakref.ref(pipe.text_encoder)
    pipe.free_text_encoder()
    gc.collect()
    assert encoder() is None
    close(pipe(prompt_embeds=prompt_embeds, generator=seeded(0), **QUICK).images, expected)
    with pytest.raises(ValueError, match="no text encoder"):
        pipe(PROMPT, **QUICK)
    pipe.free_text_encoder()  # twice does nothing


# ------------------------------------------------------------------------------------------------ what a call returns


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [
        ("np", np.ndarray, (2, 16, 16, 3)),
        ("pt", torch.Tensor, (2, 3, 16, 16)),
        ("latent", torch.Tensor, (2, 4, 8, 8)),
    ],
)
def test_output_types(original, output_type, kind, shape):
    images = original("蓝色", num_images_per_prompt=2, num_inference_steps=1, output_type=output_type).images
    assert isinstance(images, kind)
    assert images.shape == shape


def test_outputs_are_pil_images_or_a_tuple(original):
    output = original("蓝色", num_inference_steps=1, generator=seeded(0))
    assert isinstance(output, VisCPMPaintPipelineOutput)
    assert isinstance(output.images[0], PIL.Image.Image)
    assert output.nsfw_content_detected is None  # nothing was checked
    images, flags = original("蓝色", num_inference_steps=1, generator=seeded(0), return_dict=False)
    assert flags is None
    assert images[0].tobytes() == output.images[0].tobytes()


def test_candidates_differ_and_stand_alone(original):
    images = original("蓝色", num_images_per_prompt=3, generator=seeded(4, 5, 6), **QUICK).images
    assert not torch.allclose(images[0], images[1])
    close(original("蓝色", generator=seeded(5), **QUICK).images[0], images[1])


def test_sizes(original):
    assert original("蓝色", height=24, width=40, **QUICK).images.shape == (1, 3, 24, 40)
    assert original("蓝色", latents=torch.randn(1, 4, 4, 12), **QUICK).images.shape == (1, 3, 8, 24)


def test_guidance_of_one_runs_one_pass(pipe):
    sizes = []
    pipe.unet.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    pipe("蓝色", guidance_scale=1.0, **QUICK)
    pipe("蓝色", guidance_scale=2.0, **QUICK)
    assert sizes == [1, 1, 2, 2]


def test_guidance_rescale_matters(original):
    plain, rescaled = (
        original("蓝色", generator=seeded(0), guidance_rescale=value, **QUICK).images for value in (0.0, 0.7)
    )
    assert not torch.allclose(plain, rescaled)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        KDPM2DiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_any_karras_scheduler(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    images = pipe("蓝色", num_inference_steps=4, generator=seeded(0), output_type="pt").images
    assert torch.isfinite(images).all()
    close(pipe("蓝色", num_inference_steps=4, generator=seeded(0), output_type="pt").images, images)


def test_timesteps_sigmas_and_eta(pipe):
    pipe("蓝色", timesteps=[900, 400, 10], output_type="latent")
    assert pipe.scheduler.timesteps.tolist() == [900, 400, 10]
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe("蓝色", sigmas=[10.0, 3.0, 0.5, 0.0], output_type="latent")
    assert pipe.num_timesteps == 3
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    images = [pipe("蓝色", eta=eta, generator=seeded(0), **QUICK).images for eta in (0.0, 1.0)]
    assert not torch.allclose(*images)


def test_callbacks_see_and_change_everything(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    latents = pipe(
        "蓝色",
        num_inference_steps=2,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "negative_prompt_embeds"],
    ).images
    assert [entry[:2] for entry in seen] == [(0, 500), (1, 0)]
    assert seen[0][2]["prompt_embeds"][0] == 2  # with the negative ones before them
    assert not latents.any()


def test_guidance_can_be_cut_off(pipe):
    sizes = []
    pipe.unet.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    # Pairs of two lengths, so there is a mask to be cut too.
    pipe(["蓝色", PROMPT], num_inference_steps=3, output_type="latent")
    cutoff = SDCFGCutoffCallback(cutoff_step_index=0, cutoff_step_ratio=None)
    pipe("蓝色", num_inference_steps=3, output_type="latent", callback_on_step_end=cutoff)
    assert sizes == [4, 4, 4, 2, 1, 1]


def test_interrupt_stops(pipe):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    pipe("蓝色", num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0, 1]


# ---------------------------------------------------------------------------------------- image to image, inpainting


@pytest.fixture(scope="module")
def picture():
    generator = np.random.default_rng(0)
    return PIL.Image.fromarray(generator.integers(0, 255, (16, 16, 3), np.uint8))


@pytest.fixture(scope="module")
def left_half():
    mask = PIL.Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    return mask


def test_other_pipelines_share_components(original):
    for pipeline_class in (VisCPMPaintImg2ImgPipeline, VisCPMPaintInpaintPipeline):
        other = pipeline_class.from_pipe(original)
        assert other.unet is original.unet and other.text_encoder is original.text_encoder
    assert type(AutoPipelineForImage2Image.from_pipe(original)) is VisCPMPaintImg2ImgPipeline
    assert type(AutoPipelineForInpainting.from_pipe(original)) is VisCPMPaintInpaintPipeline


def test_image_to_image_at_full_strength_is_text_to_image(original, picture):
    img2img = quiet(VisCPMPaintImg2ImgPipeline.from_pipe(original))
    expected = original("蓝色", generator=seeded(0), **QUICK).images
    close(img2img("蓝色", picture, strength=1.0, generator=seeded(0), **QUICK).images, expected)


def test_image_to_image_stays_nearer_with_less_strength(original, picture):
    img2img = quiet(VisCPMPaintImg2ImgPipeline.from_pipe(original))
    pixels = img2img.image_processor.preprocess(picture)
    latents = img2img.encode_image(pixels, 1, torch.float32, torch.device("cpu"), seeded(0))
    distances = []
    for strength in (0.1, 0.5, 0.9):
        result = img2img(
            "蓝色", picture, strength=strength, num_inference_steps=10, generator=seeded(0), output_type="latent"
        ).images
        distances.append((result - latents).square().mean().item())
    assert distances == sorted(distances)


def test_image_to_image_batches(original, picture):
    img2img = quiet(VisCPMPaintImg2ImgPipeline.from_pipe(original))
    arguments = {"num_inference_steps": 4, "strength": 0.5, "output_type": "pt"}
    together = img2img(["蓝色", OTHER], [picture, picture.rotate(90)], generator=seeded(1, 2), **arguments).images
    alone = img2img(OTHER, picture.rotate(90), generator=seeded(2), **arguments).images
    close(together[1:], alone)
    with pytest.raises(ValueError, match="2 images can't be shared out to 3 results of 3 prompts"):
        img2img([OTHER] * 3, [picture, picture], **arguments)


def test_image_to_image_takes_arrays_and_tensors(original, picture):
    img2img = quiet(VisCPMPaintImg2ImgPipeline.from_pipe(original))
    array = np.asarray(picture)
    kinds = [picture, array, torch.from_numpy(array / np.float32(255)).permute(2, 0, 1)[None]]
    arguments = {"num_inference_steps": 4, "strength": 0.5, "output_type": "pt"}
    images = [img2img("蓝色", kind, generator=seeded(0), **arguments).images for kind in kinds]
    close(images[0], images[1])
    close(images[0], images[2])


def test_latents_are_images_too(original):
    """Drawn small, enlarged as latents, and drawn over."""
    img2img = quiet(VisCPMPaintImg2ImgPipeline.from_pipe(original))
    inpaint = quiet(VisCPMPaintInpaintPipeline.from_pipe(original))
    latents = original("蓝色", num_inference_steps=2, generator=seeded(0), output_type="latent").images
    large = torch.nn.functional.interpolate(latents, scale_factor=2)
    arguments = {"num_inference_steps": 4, "strength": 0.5}
    image = img2img("蓝色", large, generator=seeded(0), output_type="pt", **arguments).images
    assert image.shape == (1, 3, 32, 32)
    # Nothing is encoded: latents are what the VAE would have made of the image.
    kept = inpaint("蓝色", large, np.zeros((32, 32)), generator=seeded(0), output_type="latent", **arguments).images
    close(kept, large)
    with pytest.raises(ValueError, match=r"latents of 16 x 16, which is 32 x 32 pixels, but 16 x 24"):
        img2img("蓝色", large, height=16, width=24, **arguments)
    without = quiet(VisCPMPaintImg2ImgPipeline(**{**original.components, "vae": None}))
    assert without("蓝色", latents, output_type="latent", **arguments).images.shape == latents.shape


def test_masks_one_a_prompt(original, picture, left_half):
    inpaint = quiet(VisCPMPaintInpaintPipeline.from_pipe(original))
    right_half = ~(np.asarray(left_half) > 0)
    arguments = {"num_inference_steps": 3, "output_type": "pt"}
    together = inpaint(["蓝色"] * 2, picture, [left_half, right_half], generator=seeded(1, 2), **arguments).images
    close(together[1:], inpaint("蓝色", picture, right_half, generator=seeded(2), **arguments).images)
    with pytest.raises(ValueError, match="2 masks can't be shared out to 1"):
        inpaint("蓝色", picture, [left_half, right_half], **arguments)


def test_the_size_is_the_images(original):
    img2img = quiet(VisCPMPaintImg2ImgPipeline.from_pipe(original))
    assert img2img("蓝色", PIL.Image.new("RGB", (29, 17)), **QUICK).images.shape == (1, 3, 16, 24)
    with pytest.raises(ValueError, match="5 x 40 pixels, but 8 x 8 is the least"):
        img2img("蓝色", PIL.Image.new("RGB", (5, 40)), **QUICK)
    with pytest.raises(ValueError, match=r"`latents` has shape \(1, 4, 4, 4\)"):
        img2img("蓝色", PIL.Image.new("RGB", (16, 16)), latents=torch.zeros(1, 4, 4, 4), **QUICK)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_keeps_what_the_mask_leaves_out(original, picture, left_half, strength):
    inpaint = quiet(VisCPMPaintInpaintPipeline.from_pipe(original))
    result = inpaint(
        "蓝色", picture, left_half, strength=strength, num_inference_steps=5, generator=seeded(0), output_type="latent"
    ).images
    again = inpaint(
        OTHER, picture, left_half, strength=strength, num_inference_steps=5, generator=seeded(0), output_type="latent"
    ).images
    close(result[..., 4:], again[..., 4:])
    assert not torch.allclose(result[..., :4], again[..., :4])


def test_what_image_to_image_refuses(original, picture):
    img2img = quiet(VisCPMPaintImg2ImgPipeline.from_pipe(original))
    inpaint = quiet(VisCPMPaintInpaintPipeline.from_pipe(original))
    for strength in (0.0, 1.5, -1):
        with pytest.raises(ValueError, match="strength"):
            img2img("蓝色", picture, strength=strength)
    with pytest.raises(ValueError, match="none of 5 steps is left"):
        img2img("蓝色", picture, strength=0.1, num_inference_steps=5)
    with pytest.raises(ValueError, match="image"):
        img2img("蓝色")
    with pytest.raises(ValueError, match="mask_image"):
        inpaint("蓝色", picture)


# ------------------------------------------------------------------------------------------------ checks and ranking


@pytest.mark.parametrize("policy", ["black", "flag", "raise"])
def test_flagged_images(policy):
    pipe = quiet(VisCPMPaintPipeline(**components(), **paint_support.safety_checker(is_strict=True)))
    arguments = {"num_images_per_prompt": 2, "image_policy": policy, **QUICK}
    if policy == "raise":
        with pytest.raises(UnsafeImageError, match="image 0: .*; image 1"):
            pipe("蓝色", **arguments)
        return
    output = pipe("蓝色", **arguments)
    assert output.nsfw_content_detected == [True, True]
    assert "safety checker" in output.flag_reasons[0]
    assert output.images.any() == (policy == "flag")


def test_the_safety_checker_sees_the_image_itself():
    """The original let it see a negative, wrapped around at 256."""
    pipe = quiet(VisCPMPaintPipeline(**components(), **paint_support.safety_checker(is_strict=False)))
    seen = []
    extract = pipe.feature_extractor
    pipe.feature_extractor = lambda images, **kwargs: seen.extend(images) or extract(images, **kwargs)
    output = pipe("蓝色", num_inference_steps=2)
    assert output.nsfw_content_detected == [False]
    assert output.flag_reasons == [None]
    assert seen[0].tobytes() == output.images[0].tobytes()


def test_refused_prompts(tmp_path):
    pipe = quiet(VisCPMPaintPipeline(**components(), **paint_support.prompt_checker(tmp_path, 0.9)))
    with pytest.raises(UnsafePromptError, match="Prompt 0 .* score of 0.900, over 0.75"):
        pipe("蓝色", **QUICK)
    output = pipe(["蓝色", "红"], prompt_policy="flag", num_images_per_prompt=2, **QUICK)
    assert output.nsfw_content_detected == [True] * 4
    assert output.images.any()
    output = pipe("蓝色", prompt_policy="black", **QUICK)
    assert output.flag_reasons[0].startswith("the prompt checker says")
    assert not output.images.any()


@pytest.mark.parametrize("score", [0.1, 0.6, 0.74])
def test_prompts_below_the_threshold_pass(tmp_path, score):
    pipe = quiet(VisCPMPaintPipeline(**components(), **paint_support.prompt_checker(tmp_path, score)))
    assert pipe("蓝色 " * 100, **QUICK).nsfw_content_detected == [False]


def test_ranking(tmp_path, caplog):
    pipe = quiet(VisCPMPaintPipeline(**components(), **paint_support.ranker(tmp_path)))
    images = [PIL.Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue", "white", "black")]
    calls = []
    pipe.ranker.register_forward_hook(lambda *_: calls.append(1))
    ranked, scores, order = pipe.rank_images("蓝色", images)
    assert len(calls) == 1
    assert scores == sorted(scores, reverse=True)
    assert [images[index] for index in order] == ranked
    again = pipe.rank_images("蓝色", images[::-1])
    assert [4 - index for index in again[2]] == order
    with pytest.raises(ValueError, match="no ranker"):
        VisCPMPaintPipeline(**components()).rank_images("蓝色", images)


def test_parts_are_saved_with_the_pipeline(tmp_path):
    parts = {
        **paint_support.safety_checker(is_strict=False),
        **paint_support.prompt_checker(tmp_path, 0.1),
        **paint_support.ranker(tmp_path),
    }
    pipe = quiet(VisCPMPaintPipeline(**components(), **parts))
    pipe.save_pretrained(tmp_path / "saved")
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "saved"))
    close(loaded("蓝色", generator=seeded(0), **QUICK).images, pipe("蓝色", generator=seeded(0), **QUICK).images)
    images = [PIL.Image.new("RGB", (16, 16), color) for color in ("red", "green")]
    assert loaded.rank_images("蓝色", images)[1] == pytest.approx(pipe.rank_images("蓝色", images)[1], abs=1e-4)
    without = VisCPMPaintPipeline.from_pretrained(tmp_path / "saved", ranker=None, ranker_processor=None)
    assert without.ranker is None


# ------------------------------------------------------------------------------------- saving, memory, other libraries


def test_saved_is_loaded(original, converted, saved_folder):
    index = json.loads((saved_folder / "model_index.json").read_text("utf-8"))
    assert "VisCPMPaintPipeline" in index["_class_name"]  # alone, or with the file of its code
    assert diffusers.VisCPMPaintPipeline is VisCPMPaintPipeline
    assert converted.scheduler.config.steps_offset == 0
    images = [pipe(PROMPT, generator=seeded(0), **QUICK).images for pipe in (original, converted)]
    close(*images)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtypes(saved_folder, key):
    pipe = VisCPMPaintPipeline.from_pretrained(
        saved_folder, **{key: {"text_encoder": torch.bfloat16, "default": torch.float32}}
    )
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.unet.dtype == torch.float32
    assert torch.isfinite(quiet(pipe)(PROMPT, **QUICK).images).all()


def test_half_precision(original):
    pipe = quiet(VisCPMPaintPipeline.from_pretrained(PAINT, dtype=torch.bfloat16))
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    images = pipe(PROMPT, num_inference_steps=2, guidance_scale=1.5, generator=seeded(0), output_type="pt").images
    assert torch.isfinite(images).all()


def test_group_offload_and_layerwise_casting(original):
    expected = original(PROMPT, generator=seeded(0), **QUICK).images
    pipe = quiet(VisCPMPaintPipeline.from_pretrained(PAINT))
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    close(pipe(PROMPT, generator=seeded(0), **QUICK).images, expected)
    pipe = quiet(VisCPMPaintPipeline.from_pretrained(PAINT))
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert torch.isfinite(pipe(PROMPT, generator=seeded(0), **QUICK).images).all()


def test_slicing_tiling_channels_last_and_freeu(pipe):
    expected = pipe(["蓝色", OTHER], generator=seeded(0, 1), **QUICK).images
    pipe.vae.enable_slicing()
    pipe.unet.to(memory_format=torch.channels_last)
    close(pipe(["蓝色", OTHER], generator=seeded(0, 1), **QUICK).images, expected)
    pipe.vae.enable_tiling()
    assert pipe("蓝色", height=32, width=32, **QUICK).images.shape == (1, 3, 32, 32)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert torch.isfinite(pipe("蓝色", generator=seeded(0), **QUICK).images).all()
    pipe.disable_freeu()


def test_lora_on_the_unet(pipe, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    plain = pipe("蓝色", generator=seeded(0), **QUICK).images
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = pipe("蓝色", generator=seeded(0), **QUICK).images
    assert not torch.allclose(plain, adapted)
    VisCPMPaintPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    close(pipe("蓝色", generator=seeded(0), cross_attention_kwargs={"scale": 0.0}, **QUICK).images, plain)
    pipe.unload_lora_weights()
    close(pipe("蓝色", generator=seeded(0), **QUICK).images, plain)
    pipe.load_lora_weights(tmp_path)
    close(pipe("蓝色", generator=seeded(0), **QUICK).images, adapted)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_text_encoder(tmp_path, bits):
    whole = VisCPMPaintPipeline(**components(dim_model=64, dim_ff=128))  # 4-bit blocks have 64 values
    whole.save_pretrained(tmp_path)
    options = {4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, 8: {"load_in_8bit": True}}[bits]
    options["llm_int8_skip_modules"] = ["projection"]  # narrower here than bitsandbytes can pack
    config = PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{bits}bit", quant_kwargs=options, components_to_quantize=["text_encoder"]
    )
    pipe = quiet(VisCPMPaintPipeline.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32))
    assert "bit" in type(pipe.text_encoder.model.layers[0].mlp.up_proj).__name__.lower()
    embeds, expected = (each.encode_prompt(PROMPT)[0] for each in (pipe, whole))
    assert torch.nn.functional.cosine_similarity(embeds.float(), expected, dim=-1).mean() > 0.5


@pytest.mark.parametrize("backend", ["eager"])
def test_compiles_without_a_break(original, backend):
    expected = original(PROMPT, generator=seeded(0), **QUICK).images
    pipe = quiet(VisCPMPaintPipeline.from_pipe(original))
    pipe.unet = torch.compile(original.unet, backend=backend, fullgraph=True)
    close(pipe(PROMPT, generator=seeded(0), **QUICK).images, expected)


def test_call_signature_has_what_users_of_stable_diffusion_pass():
    stable_diffusion = inspect.signature(diffusers.StableDiffusionPipeline.__call__).parameters
    ours = inspect.signature(VisCPMPaintPipeline.__call__).parameters
    missing = set(stable_diffusion) - set(ours)
    # Options of CLIP and of image prompts, and the arguments of before.
    assert missing == {"clip_skip", "ip_adapter_image", "ip_adapter_image_embeds", "kwargs"}
    shared = [name for name in stable_diffusion if name in ours]
    assert [name for name in ours if name in stable_diffusion] == shared  # and in the same order


def test_copies_and_pickles_draw_the_same(pipe):
    arguments = {"generator": seeded(0), **QUICK}
    expected = pipe("蓝色", **arguments).images
    for other in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        close(quiet(other)("蓝色", generator=seeded(0), **QUICK).images, expected)
    pipe.free_text_encoder()
    embeds = torch.ones(1, 5, 24)
    images = [
        quiet(each)(prompt_embeds=embeds, generator=seeded(0), **QUICK).images
        for each in (pipe, pickle.loads(pickle.dumps(pipe)))
    ]
    close(*images)


def test_numpy_integers(original):
    sizes = {"height": np.int64(16), "width": np.int32(24)}
    counts = {"num_inference_steps": np.int64(2), "num_images_per_prompt": np.int8(1)}
    assert original("蓝色", output_type="pt", **sizes, **counts).images.shape == (1, 3, 16, 24)


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 20}, "`height` has to be a positive multiple of 8 but is 20"),
        ({"width": 0}, "multiple of 8"),
        ({"width": -8}, "multiple of 8"),
        ({"height": 16.0}, "multiple of 8"),
        ({"height": 800_000}, "`height` is 800,000, more than the 4,096"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"output_type": "jpg"}, "output_type"),
        ({"image_policy": "none"}, "image_policy"),
        ({"negative_prompt": ["a", "b"]}, "batch size 2, but `prompt` has batch size 1"),
        ({"negative_prompt": 3}, "negative_prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "Provide either"),
        ({"prompt": "a" * 10_000}, "10,0.. tokens, but the text encoder takes 3,000"),
        ({"prompt_embeds": torch.zeros(1, 5, 24)}, "Cannot forward both"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 5, 23)},
            r"\(1, 5, 23\) but should have \(1, sequence, 24\)",
        ),
        ({"prompt": None, "prompt_embeds": torch.zeros(5, 24)}, "should have"),
        ({"negative_prompt_embeds": torch.zeros(2, 5, 24)}, "should have"),
        ({"negative_prompt_embeds": torch.full((1, 5, 24), torch.nan)}, "not finite"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"\(2, 4, 8, 8\), but .* needs \(1, 4, 8, 8\)"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "`latents` is not finite"),
        ({"generator": [torch.Generator()] * 2}, "list of generators of length 2"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs"),
        (
            {
                "prompt": None,
                "prompt_embeds": torch.ones(1, 5, 24),
                "negative_prompt_embeds": torch.ones(1, 6, 24),
            },
            "must have the same shape",
        ),
    ],
)
def test_bad_input_is_one_clear_error(original, arguments, message):
    with pytest.raises(ValueError, match=message):
        original(**{"prompt": "蓝色", **QUICK, **arguments})


def test_the_empty_prompt_is_a_prompt(original):
    """As in diffusers; the reference draws something for it too."""
    assert original("", **QUICK).images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_overflow_is_named(pipe, part):
    weight = {
        "text_encoder": pipe.text_encoder.projection.weight,
        "unet": pipe.unet.conv_out.weight,
        "vae": pipe.vae.decoder.conv_out.weight,
    }[part]
    with torch.no_grad():
        weight.fill_(torch.inf)
    what = {"text_encoder": "text encoder's output", "unet": "latents", "vae": "VAE's output"}[part]
    with pytest.raises(ValueError, match=f"{what} (is|are) not finite .*torch.float32"):
        pipe("蓝色", **QUICK)


def test_without_a_vae_there_are_latents(pipe):
    without = quiet(VisCPMPaintPipeline(**{**components(), "vae": None}))
    with pytest.raises(ValueError, match="openbmb/VisCPM-Paint"):
        without("蓝色", num_inference_steps=1)


def test_a_model_needs_its_processor():
    with pytest.raises(ValueError, match="`safety_checker` needs a `feature_extractor`"):
        VisCPMPaintPipeline(
            **components(), safety_checker=paint_support.safety_checker(is_strict=True)["safety_checker"]
        )


# ------------------------------------------------------------------------------------------------------ original files


def make_layout(folder, *, in_parts: bool):
    """A folder as the original's repository is, or may be."""
    import shutil

    llm = json.loads((PAINT / "cpm-bee.json").read_text("utf-8"))
    config = {"model_type": "cpmbee", **llm, "unet_cross_attention_dim": 24}
    state_dict = torch.load(PAINT / "pytorch_model.bin", weights_only=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "VisCPMPaintPipeline"}), "utf-8")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", **CONFIGS["vae"]}), "utf-8"
    )
    shutil.copy(PAINT / "vae.bin", folder / "vae" / "diffusion_pytorch_model.bin")
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(
        json.dumps({"_class_name": "UNet2DConditionModel", **CONFIGS["unet"]}), "utf-8"
    )
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "PNDMScheduler", "steps_offset": 1}), "utf-8"
    )
    home = folder / "text_encoder" if in_parts else folder
    home.mkdir(exist_ok=True)
    (home / "config.json").write_text(json.dumps(config), "utf-8")
    if in_parts:
        (folder / "tokenizer").mkdir()
        shutil.copy(PAINT / "vocab.txt", folder / "tokenizer")
        unet = {name.removeprefix("unet."): value for name, value in state_dict.items() if name.startswith("unet.")}
        torch.save(unet, folder / "unet" / "diffusion_pytorch_model.bin")
        text = {name: value for name, value in state_dict.items() if not name.startswith("unet.")}
        torch.save(text, home / "pytorch_model.bin")
    else:
        shutil.copy(PAINT / "vocab.txt", folder)
        shutil.copy(PAINT / "pytorch_model.bin", folder)
    return folder


@pytest.mark.parametrize("in_parts", [False, True])
def test_the_original_repository_loads_as_it_is(tmp_path, golden, in_parts):
    pipe = quiet(VisCPMPaintPipeline.from_pretrained(make_layout(tmp_path, in_parts=in_parts)))
    output = pipe(
        CASES[0]["prompt"],
        latents=golden["0.latents"],
        generator=seeded(CASES[0]["generator_seed"]),
        output_type="np",
        **CASES[0]["kwargs"],
    )
    close(torch.from_numpy(output.images), golden["0.image"], atol=1e-4)


def test_a_missing_vae_says_where_it_is(tmp_path):
    for name in ("pytorch_model.bin", "vocab.txt", "cpm-bee.json", "diffusion.json"):
        (tmp_path / name).symlink_to(PAINT / name)
    with pytest.raises(FileNotFoundError, match="`vae/` of openbmb/VisCPM-Paint"):
        VisCPMPaintPipeline.from_pretrained(tmp_path)
    pipe = VisCPMPaintPipeline.from_pretrained(tmp_path, vae=PAINT / "vae.bin")
    assert pipe.vae is not None


def test_old_convolutional_attention_of_the_vae_loads(tmp_path, original):
    state_dict = torch.load(PAINT / "vae.bin", weights_only=True)
    for name in state_dict:
        if ".attentions." in name and name.endswith("weight") and state_dict[name].ndim == 2:
            state_dict[name] = state_dict[name][..., None, None]
    torch.save(state_dict, tmp_path / "vae.bin")
    from viscpm_hf.loading.paint import load_vae

    vae = load_vae(tmp_path / "vae.bin", CONFIGS["vae"])
    for name, tensor in original.vae.state_dict().items():
        assert torch.equal(vae.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("unet.conv_in.weight"), "1 tensors missing .*conv_in.weight"),
        (lambda tensors: tensors.update({"unet.more": torch.zeros(1)}), "1 unknown tensors"),
        (lambda tensors: tensors.update({"unet.conv_in.bias": torch.zeros(3)}), "another shape"),
        (lambda tensors: tensors.pop("trans_block.layernorm.bias"), "1 tensors missing .*layer_norm.bias"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    for name in ("vae.bin", "vocab.txt", "cpm-bee.json", "diffusion.json"):
        (tmp_path / name).symlink_to(PAINT / name)
    tensors = torch.load(PAINT / "pytorch_model.bin", weights_only=True)
    change(tensors)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(OriginalCheckpointError, match=message):
        VisCPMPaintPipeline.from_pretrained(tmp_path)


def test_a_chat_checkpoint_is_refused_by_name():
    with pytest.raises(OriginalCheckpointError, match="VisCPM-Chat checkpoint .* can't paint"):
        VisCPMPaintPipeline.from_pretrained(PAINT.parent / "chat_a")


def test_a_path_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        VisCPMPaintPipeline.from_pretrained("./nowhere/paint")
