"""What a batch of Paint's training is: prompts as inference sees them, weights of the loss, draws."""

import paint_support
import pytest
import torch
from diffusers import DDPMScheduler
from paint_training_support import CAPTIONS, save_pipeline, write_captions

from viscpm_hf import VisCPMPaintPipeline
from viscpm_hf.training.paint_cache import text_key
from viscpm_hf.training.paint_data import CaptionDataset, open_part
from viscpm_hf.training.paint_encoding import (
    PADDING,
    PromptProjection,
    encode_pictures,
    encode_prompts,
    picture_cache,
    prompt_cache,
)
from viscpm_hf.training.paint_model import PaintTrainingModel
from viscpm_hf.training.paint_trainer import PaintBatchShape, PaintDraws, collate


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("paint") / "model")


def make(model, folder, is_projected: bool, **options):
    prompts = prompt_cache(folder, model, is_projected=is_projected)
    encode_prompts(CAPTIONS, prompts, model, CPU, is_projected=is_projected, batch_size=3)
    parts = paint_support.components()
    projection = None if is_projected else PromptProjection.from_text_encoder(model / "text_encoder")
    trained = PaintTrainingModel(
        parts["unet"], projection, parts["scheduler"], prompts[text_key("")], prompts[PADDING], **options
    )
    return trained, prompts


@pytest.mark.parametrize("is_projected", [True, False], ids=["embeds", "hidden"])
@pytest.mark.parametrize("mask_padding", [False, True], ids=["padding seen", "padding hidden"])
def test_training_sees_the_prompts_that_inference_sees(model, tmp_path, is_projected, mask_padding):
    trained, prompts = make(model, tmp_path, is_projected, mask_padding=mask_padding)
    pipeline = VisCPMPaintPipeline.from_pretrained(model, mask_padding=mask_padding)
    with torch.no_grad():
        expected, expected_negative = pipeline.encode_prompt(list(CAPTIONS))
        batch = collate([{"prompt_states": prompts[text_key(caption)]} for caption in CAPTIONS])
        for dropped, theirs in ((False, expected), (True, expected_negative)):
            is_dropped = torch.full((len(CAPTIONS),), dropped)
            ours = trained.prompt_embeds(batch["prompt_states"], batch["prompt_mask"], is_dropped)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            assert torch.equal(ours != 0, theirs != 0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_bound_the_weight_in_terms_of_the_picture(model, tmp_path, kind):
    trained, _ = make(model, tmp_path, True, snr_gamma=5.0)
    trained.scheduler = DDPMScheduler.from_config(trained.scheduler.config, prediction_type=kind)
    timesteps = torch.tensor([0, 100, 400, 999])
    alphas = trained.scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    # An error of the prediction, as one of the picture.
    per_picture = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(4)}[kind]
    torch.testing.assert_close(trained.weights(timesteps) * per_picture, snr.clamp(max=5.0), rtol=1e-3, atol=1e-5)


def test_draws_depend_on_their_number_alone_and_differ_between_passes(model, tmp_path):
    data = CaptionDataset([open_part(write_captions(tmp_path / "data", 4))])
    pictures, prompts = picture_cache(tmp_path, model, 16), prompt_cache(tmp_path, model, is_projected=True)
    encode_prompts(data.captions, prompts, model, CPU, is_projected=True, batch_size=2)
    keys, count = encode_pictures(data, pictures, model, 16, CPU, batch_size=3)
    assert count == 4 and None not in keys
    draws = PaintDraws(data.captions, keys, prompts, pictures, PaintBatchShape("1", 1000, 0.5, 0.5, 0.1))
    first, again, next_pass = draws[1], draws[1], draws[1 + len(draws)]
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
    assert not torch.equal(first["noise"], next_pass["noise"])
    assert torch.equal(first["prompt_states"], next_pass["prompt_states"])
    assert sum(bool(draws[number]["is_dropped"]) for number in range(200)) in range(70, 130)


def test_latents_are_those_of_the_vae(model, tmp_path):
    data = CaptionDataset([open_part(write_captions(tmp_path / "data", 3))])
    pictures = picture_cache(tmp_path, model, 16)
    keys, _ = encode_pictures(data, pictures, model, 16, CPU, batch_size=2)
    pipeline = VisCPMPaintPipeline.from_pretrained(model)
    for index, key in enumerate(keys):
        from viscpm_hf.training.paint_data import load_square

        pixels = pipeline.image_processor.preprocess(load_square(data[index].image, 16))
        with torch.no_grad():
            expected = pipeline.vae.encode(pixels).latent_dist.parameters[0]
        torch.testing.assert_close(pictures[key], expected, rtol=1e-5, atol=1e-5)
