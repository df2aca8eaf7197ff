"""The views of MiniCPM-V's pictures, and the siblings' other preprocessing."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor, CLIPImageProcessorPil

from viscpm_hf import MiniCPMVImageProcessor, VisCPMImageProcessor
from viscpm_hf.modeling.image_processing_minicpmv import plan_slices


# Picture; overview; columns x rows; tile; all width x height in pixels.
GOLDEN = """
448x448   448x448  -   -
100x50    630x322  -   -
30x900    84x2450  -   -
640x480   518x392  2x1 364x546
800x600   518x392  2x2 518x392
672x448   546x364  2x1 392x518
449x448   448x448  2x1 322x630
1344x1344 448x448  3x3 448x448
1920x1080 602x336  4x2 420x476
1080x1920 336x602  2x4 476x420
3000x500  1092x182 7x1 420x476
500x3000  182x1092 1x7 476x420
4000x3000 518x392  3x3 518x392
""".strip().splitlines()


def sizes(line):
    return [None if field == "-" else tuple(map(int, field.split("x"))) for field in line.split()]


def picture(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


@pytest.mark.parametrize("line", GOLDEN)
def test_slices_of_the_release(line):
    (width, height), overview, grid, tile = sizes(line)
    plan = plan_slices(height, width)
    assert plan.overview[::-1] == overview
    assert (plan.grid and plan.grid[::-1], plan.tile and plan.tile[::-1]) == (grid, tile)
    assert plan.num_views == 1 + (grid[0] * grid[1] if grid else 0)


@pytest.mark.parametrize("size", [(2, 2), (1, 4000), (4000, 1), (449, 449), (5000, 5000), (37, 1201)])
def test_any_aspect_ratio_has_at_most_nine_tiles_of_whole_patches(size):
    plan = plan_slices(*size)
    assert plan.num_views <= 10
    for height, width in filter(None, (plan.overview, plan.tile)):
        assert height % 14 == width % 14 == 0 and height > 0 and width > 0


def test_views_are_cut_of_the_whole_picture_row_by_row():
    image = picture(640, 480)
    found = MiniCPMVImageProcessor()(image, return_tensors="pt")
    assert found["image_sizes"].tolist() == [[392, 518], [546, 364], [546, 364]]
    assert (found["num_views"].tolist(), found["grids"].tolist()) == ([3], [[1, 2]])
    assert found["pixel_values"].shape == (3, 3, 546, 518)
    refined = image.resize((2 * 364, 546), PIL.Image.Resampling.BICUBIC)
    expected = [image.resize((518, 392), PIL.Image.Resampling.BICUBIC)]
    expected += [refined.crop((column * 364, 0, column * 364 + 364, 546)) for column in range(2)]
    for view, (height, width), part in zip(found["pixel_values"], found["image_sizes"], expected, strict=True):
        values = (np.asarray(part, np.float32).transpose(2, 0, 1) / 255 - 0.5) / 0.5
        torch.testing.assert_close(view[:, :height, :width], torch.from_numpy(values), atol=1e-6, rtol=0)
        assert not view[:, height:].any() and not view[:, :, width:].any()


def test_pictures_of_different_views_together_are_each_as_alone():
    processor = MiniCPMVImageProcessor(scale_resolution=56)
    images = [picture(90, 40), picture(20, 20, 1), picture(40, 200, 2)]
    together = processor(images, return_tensors="pt")
    assert together["num_views"].tolist() == [processor(image)["num_views"][0] for image in images]
    offset = 0
    for image in images:
        alone = processor(image, return_tensors="pt")
        height, width = alone["pixel_values"].shape[-2:]
        own = slice(offset, offset + len(alone["pixel_values"]))
        assert torch.equal(together["pixel_values"][own, :, :height, :width], alone["pixel_values"])
        assert torch.equal(together["image_sizes"][own], alone["image_sizes"])
        offset = own.stop


def test_the_other_modes():
    image = picture(100, 50)
    square = MiniCPMVImageProcessor(slice_mode="square", size={"height": 70, "width": 70})(image, return_tensors="pt")
    assert square["pixel_values"].shape == (1, 3, 70, 70)
    whole = MiniCPMVImageProcessor(slice_mode="whole")(image, return_tensors="pt")
    assert whole["pixel_values"].shape == (1, 3, 50, 100)
    expected = (torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(whole["pixel_values"][0], expected)


def test_arrays_and_transparency():
    processor = MiniCPMVImageProcessor(scale_resolution=56)
    image = picture(60, 30)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    channels_first = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    assert torch.equal(processor(channels_first, return_tensors="pt")["pixel_values"], expected)
    transparent = image.convert("RGBA")
    transparent.putalpha(0)
    assert torch.equal(processor(transparent, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"slice_mode": "hd"}, r"slice_mode is one of square, adaptive, whole, got 'hd'"),
        ({"max_slice_nums": 0}, r"max_slice_nums must be a whole number of at least 1, got 0"),
        ({"patch_size": -14}, r"patch_size must be .* got -14"),
    ],
)
def test_unknown_slicing(options, match):
    with pytest.raises(ValueError, match=match):
        MiniCPMVImageProcessor(**options)
    with pytest.raises(ValueError, match=match):
        MiniCPMVImageProcessor()(picture(8, 8), **options)


@pytest.mark.parametrize(
    ("image", "match"),
    [
        ("nothing.png", "neither an image file"),
        (b"no picture", "not an image file"),
        (picture(1, 50), "at least 2 pixels"),
        ([], "at least one image"),
        (3, "Expected an image"),
    ],
)
def test_bad_pictures(image, match):
    with pytest.raises(ValueError, match=match):
        MiniCPMVImageProcessor()(image)


def test_a_saved_processor_is_the_same(tmp_path):
    processor = MiniCPMVImageProcessor(max_slice_nums=4, slice_mode="adaptive", scale_resolution=56)
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is MiniCPMVImageProcessor and again.to_dict() == processor.to_dict()


@pytest.mark.parametrize("name", ["omnilmm", "visualcla"])
def test_one_view_as_clip_makes_it(whole_folders, name):
    processor = VisCPMImageProcessor.from_pretrained(whole_folders[name])
    if name == "omnilmm":
        native = CLIPImageProcessorPil(size={"height": 84, "width": 84}, do_center_crop=False)
    else:
        native = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    for size in ((90, 60), (200, 60), (40, 30)):  # of tall ones, Pillow 12 and 13 make different pixels
        image = picture(*size)
        found = processor(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, native(image, return_tensors="pt")["pixel_values"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("slice_mode", ["adaptive", "square", "whole"])
def test_pictures_of_all_kinds_are_the_same_picture(slice_mode):
    """Upright, and at their contrast, as with [`VisCPMImageProcessor`]."""
    processor = MiniCPMVImageProcessor(slice_mode=slice_mode, scale_resolution=28, size={"height": 28, "width": 28})
    shown = picture(40, 90).convert("L")
    levels = np.asarray(shown)
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    lying = io.BytesIO()
    shown.transpose(PIL.Image.Transpose.ROTATE_270).save(lying, "PNG", exif=exif)
    expected = processor([shown], return_tensors="pt")
    given = [
        lying.getvalue(),
        PIL.Image.open(lying),
        PIL.Image.fromarray(levels.astype(np.uint16) * 257),
        (levels / 255).astype(np.float32),
        torch.tensor(levels)[None] / 255,
    ]
    for image in given:
        found = processor([image], return_tensors="pt")
        assert {name: value.tolist() for name, value in found.items()} == {
            name: value.tolist() for name, value in expected.items()
        }
    floats = processor([levels / 255], do_rescale=False, return_tensors="pt")
    torch.testing.assert_close(floats["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
