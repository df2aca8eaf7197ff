"""The image safety checker: a real one of diffusers, with random weights."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from support import Golden
from transformers import CLIPConfig, CLIPImageProcessor

from viscpm_hf import ImageSafetyChecker, UnsafeImageError, VisCPMChat, tiny
from viscpm_hf.cli.main import main


def flag_everything(checker: StableDiffusionSafetyChecker, flags: bool) -> None:
    """Concepts that every image is near to, or none."""
    checker.concept_embeds_weights.fill_(-2.0 if flags else 2.0)
    checker.special_care_embeds_weights.fill_(2.0)


@pytest.fixture
def write_checker(tmp_path):
    """Writes a tiny checker that flags everything or nothing, and returns its folder."""

    def write(flags: bool):
        torch.manual_seed(0)
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
        config = CLIPConfig(vision_config={**vision, "patch_size": 16}, projection_dim=8)
        checker = StableDiffusionSafetyChecker(config)
        flag_everything(checker, flags)
        checker.save_pretrained(tmp_path)
        size = {"height": 32, "width": 32}
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_checks_an_image(write_checker, flags, mode):
    checker = ImageSafetyChecker.from_pretrained(write_checker(flags), device="cpu")
    assert not checker.safety_checker.training
    image = PIL.Image.new(mode, (40, 30), 7)
    before = image.tobytes()
    assert checker(image) is flags
    assert image.tobytes() == before  # the checker blacks out what it flags: a copy


def test_pixels_are_in_the_checkers_range(write_checker):
    """Images as RGB in 0..1, the CLIP input through the checker's own processor."""
    checker, seen = ImageSafetyChecker.from_pretrained(write_checker(False)), []
    checker.safety_checker.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    checker(image)
    (given,) = seen
    assert given["images"].shape == (1, 30, 40, 3)
    np.testing.assert_allclose(given["images"][0], pixels / 255, atol=1e-6)
    expected = checker.image_processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(given["clip_input"], expected)


def test_half_precision(write_checker):
    checker = ImageSafetyChecker.from_pretrained(write_checker(True))
    checker.safety_checker.to(torch.bfloat16)
    assert checker(PIL.Image.new("RGB", (40, 30))) is True


@pytest.mark.parametrize("flags", [True, False])
def test_chat_loads_it_by_its_folder(write_checker, flags):
    golden = Golden("chat_a")
    chat = VisCPMChat(golden.weights, image_safety_checker=write_checker(flags), device="cpu")
    assert isinstance(chat.image_safety_checker, ImageSafetyChecker)
    if flags:
        with pytest.raises(UnsafeImageError, match="flagged the image"):
            chat.chat(golden.image(0), "颜色", max_new_tokens=2)
    else:
        expected = golden.load_chat().chat(golden.image(0), "颜色", max_new_tokens=2)[0]
        assert chat.chat(golden.image(0), "颜色", max_new_tokens=2)[0] == expected


def test_folder_without_a_checker(tmp_path):
    with pytest.raises(OSError, match="safety checker can't be loaded from .*switch the check off") as caught:
        ImageSafetyChecker.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_true_is_the_originals(write_checker, monkeypatch):
    """Here a tiny one in place of the Hub's."""
    monkeypatch.setattr("viscpm_hf.chat.chat.DEFAULT_SAFETY_CHECKER", str(write_checker(True)))
    chat = Golden("chat_a").load_chat(image_safety_checker=True)
    assert isinstance(chat.image_safety_checker, ImageSafetyChecker)


@pytest.mark.parametrize("flags", [True, False])
def test_commands_check_when_asked_to(write_checker, flags, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    PIL.Image.new("RGB", (40, 40), "red").save(picture)
    check = ["--check-image", "--image-checker", str(write_checker(flags)), "--device", "cpu"]
    assert main(["chat", "viscpm-tiny", str(picture), "What colour is it?", *check]) == int(flags)
    assert ("flagged the image" in capsys.readouterr().err) is flags
    rows, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text(json.dumps({"id": 1, "image": str(picture), "question": "What colour is it?"}) + "\n")
    assert main(["batch", "viscpm-tiny", str(rows), str(answers), *check]) == 0
    assert ("flagged the image" in json.loads(answers.read_text()).get("error", "")) is flags


def test_commands_do_not_check_unless_asked_to(capsys):
    """As the original's class: its checker is an argument that is off."""
    assert main(["chat", str(tiny("chat")), "", "What?", "--image-checker", "folder", "--device", "cpu"]) == 1
    assert "--image-checker folder checks nothing without --check-image" in capsys.readouterr().err
