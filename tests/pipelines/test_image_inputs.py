"""Every kind of image and mask is the same picture; what can't be told is refused."""

import numpy as np
import PIL.Image
import pytest
import torch

from viscpm_hf.pipelines.image_inputs import read_images, read_masks, to_pixels


BYTES = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
IMAGE = PIL.Image.fromarray(BYTES)
GREY = IMAGE.convert("L")
UNIT = BYTES.astype(np.float32) / 255
TENSOR = torch.from_numpy(UNIT).permute(2, 0, 1)
MASK_BITS = np.zeros((16, 24), bool)
MASK_BITS[:, :12] = True
MASK = PIL.Image.fromarray(MASK_BITS.astype(np.uint8) * 255)


def pixels(value, height=16, width=24):
    return to_pixels(read_images(value, 4), height, width)


EXPECTED, EXPECTED_GREY = pixels(IMAGE), pixels(GREY)
ALPHA = IMAGE.convert("RGBA")
ALPHA.putalpha(PIL.Image.fromarray(np.tile(np.arange(24, dtype=np.uint8) * 11, (16, 1))))
BEHIND = np.asarray(PIL.Image.alpha_composite(PIL.Image.new("RGBA", (24, 16), "white"), ALPHA).convert("RGB"))

COLOURED = {
    "PIL": IMAGE,
    "list of PIL": [IMAGE],
    "tuple": (IMAGE,),
    "RGBA, opaque": IMAGE.convert("RGBA"),
    "CMYK": IMAGE.convert("CMYK"),
    "bytes (H, W, 3)": BYTES,
    "bytes (3, H, W)": np.moveaxis(BYTES, -1, 0),
    "bytes (N, H, W, 3)": BYTES[None],
    "floats (H, W, 3)": UNIT,
    "doubles (H, W, 3)": UNIT.astype(np.float64),
    "floats (3, H, W)": np.moveaxis(UNIT, -1, 0),
    "floats (N, 3, H, W)": np.moveaxis(UNIT, -1, 0)[None],
    "floats in -1..1": UNIT * 2 - 1,
    "16 bits": BYTES.astype(np.uint16) * 257,
    "opaque floats (H, W, 4)": np.concatenate([UNIT, np.ones_like(UNIT[..., :1])], -1),
    "tensor (3, H, W)": TENSOR,
    "tensor (H, W, 3)": torch.from_numpy(UNIT),
    "tensor (N, 3, H, W)": TENSOR[None],
    "tensor in -1..1": TENSOR * 2 - 1,
    "tensor of bytes": torch.from_numpy(BYTES).permute(2, 0, 1),
    "tensor with a gradient": TENSOR.clone().requires_grad_(),
    "list of batches": [TENSOR[None]],
}
UNCOLOURED = {
    "L": GREY,
    "LA": GREY.convert("LA"),
    "P": GREY.convert("P"),
    "PA": GREY.convert("PA"),
    "F": GREY.convert("F"),
    "F in 0..1": PIL.Image.fromarray(np.asarray(GREY, np.float32) / 255),
    "I": GREY.convert("I"),
    "I;16": PIL.Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257),
    "I of 16 bits": PIL.Image.fromarray(np.asarray(GREY).astype(np.int32) * 257),
    "bytes (H, W)": np.asarray(GREY),
    "bytes (H, W, 1)": np.asarray(GREY)[..., None],
    "tensor (H, W)": torch.from_numpy(np.asarray(GREY).copy()),
    "tensor (1, H, W)": torch.from_numpy(np.asarray(GREY)[None] / np.float32(255)),
}


@pytest.mark.parametrize(
    ("kind", "expected"), [*((kind, "colour") for kind in COLOURED), *((kind, "grey") for kind in UNCOLOURED)]
)
def test_kinds_of_images(kind, expected):
    actual = pixels(COLOURED[kind] if expected == "colour" else UNCOLOURED[kind])
    expected = EXPECTED if expected == "colour" else EXPECTED_GREY
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.005 if kind == "CMYK" else 1e-6)


@pytest.mark.parametrize("kind", ["RGBA", "RGBa", "palette", "colour key", "array", "floats"])
def test_transparency_lies_on_white(kind):
    if kind == "palette":
        image = PIL.Image.fromarray((np.arange(16 * 24) % 2).astype(np.uint8).reshape(16, 24), "P")
        image.putpalette([0, 0, 0, 9, 9, 9])
        image.info["transparency"] = 1
        expected = np.where((np.arange(16 * 24) % 2).reshape(16, 24, 1), 255, 0) * np.ones(3)
    elif kind == "colour key":
        image = PIL.Image.new("RGB", (24, 16), "red")
        image.info["transparency"] = (255, 0, 0)
        expected = np.full((16, 24, 3), 255)
    else:
        whole = np.asarray(ALPHA)
        image = {"RGBA": ALPHA, "RGBa": ALPHA.convert("RGBa"), "array": whole, "floats": whole / np.float32(255)}[kind]
        expected = BEHIND
    actual = pixels(image)[0].permute(1, 2, 0) * 255
    # PIL rounds what it multiplies with the opacity.
    tolerance = 16 if kind == "RGBa" else 1.01
    torch.testing.assert_close(actual, torch.from_numpy(expected).float(), rtol=0, atol=tolerance)


def test_photographs_are_upright():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = IMAGE.rotate(90, expand=True)
    turned.info["exif"] = exif.tobytes()
    turned.getexif()[0x0112] = 6
    torch.testing.assert_close(pixels(turned), EXPECTED)


def test_black_and_white():
    image = GREY.convert("1")
    torch.testing.assert_close(pixels(image), pixels(image.convert("RGB")))
    torch.testing.assert_close(pixels(np.asarray(image)), pixels(image.convert("RGB")))


def test_sizes_are_made_one():
    # Smooth: between its two passes PIL rounds bytes and cuts off overshoot.
    other = PIL.Image.merge("RGB", [PIL.Image.linear_gradient("L").resize((40, 30))] * 3)
    together = pixels([IMAGE, other, np.asarray(other), np.asarray(other, np.float32) / 255], 24, 32)
    assert together.shape == (4, 3, 24, 32)
    torch.testing.assert_close(together[1], together[2])
    torch.testing.assert_close(together[1], together[3], rtol=0, atol=0.006)


def test_latents_are_told_from_pixels():
    latents = torch.randn(2, 4, 8, 8)
    for value in (latents, latents.numpy(), list(latents), [latents[:1], latents[1:]]):
        assert torch.equal(read_images(value, 4), latents)
    assert len(read_images(np.zeros((4, 4, 4), np.uint8), 4)) == 1
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        read_images(torch.rand(5, 6, 7), 4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "empty list"),
        ("cat.png", "holds str"),
        (UNIT * 255, r"floats from 0 to 255: they have to be in 0..1 .* uint8"),
        (np.full((8, 8, 3), np.nan), "not finite"),
        (BYTES.astype(np.int64), "int64 numbers"),
        (np.zeros((8, 8, 5), np.uint8), r"shape \(8, 8, 5\)"),
        (np.zeros((1, 1, 8, 8, 3)), "shape"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), "latents are floats"),
        (torch.full((1, 4, 8, 8), torch.inf), "not finite"),
        ([torch.zeros(1, 4, 8, 8), IMAGE], "mixes latents with pixels"),
        ([torch.zeros(4, 8, 8), torch.zeros(4, 8, 9)], "several sizes"),
        (PIL.Image.fromarray(np.full((8, 8), 70000, np.int32)), "mode I with numbers from 7e"),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises(ValueError, match=message):
        read_images(image, 4)


MASKS = {
    "L": MASK,
    "1": MASK.convert("1"),
    "RGB": MASK.convert("RGB"),
    "RGBA, opaque": MASK.convert("RGBA"),
    "LA, opaque": MASK.convert("LA"),
    "P": MASK.convert("P"),
    "F": MASK.convert("F"),
    "I": MASK.convert("I"),
    "L of zeros and ones": PIL.Image.fromarray(MASK_BITS.astype(np.uint8)),
    "bool": MASK_BITS,
    "zeros and ones": MASK_BITS.astype(np.uint8),
    "integers": MASK_BITS.astype(np.int64),
    "bytes": np.asarray(MASK),
    "bytes (H, W, 3)": np.asarray(MASK.convert("RGB")),
    "floats": MASK_BITS.astype(np.float32),
    "floats to 255": MASK_BITS * 255.0,
    "(1, H, W)": MASK_BITS[None].astype(np.float32),
    "(H, W, 1)": MASK_BITS[..., None].astype(np.float32),
    "(N, H, W, 1)": MASK_BITS[None, ..., None],
    "tensor (H, W)": torch.from_numpy(MASK_BITS),
    "tensor (1, H, W)": torch.from_numpy(MASK_BITS)[None].float(),
    "tensor (3, H, W)": torch.from_numpy(MASK_BITS)[None].expand(3, -1, -1).float(),
    "tensor (N, 1, H, W)": torch.from_numpy(MASK_BITS)[None, None].float(),
    "list": [MASK],
}


@pytest.mark.parametrize("kind", MASKS)
def test_kinds_of_masks(kind):
    mask = to_pixels(read_masks(MASKS[kind]), 16, 24)
    assert mask.shape == (1, 1, 16, 24)
    assert torch.equal(mask[0, 0], torch.from_numpy(MASK_BITS).float())


def test_several_masks():
    other = ~MASK_BITS
    both = torch.from_numpy(np.stack([MASK_BITS, other])).float()
    for value in ([MASK, other], both, both.numpy(), both[:, None], [both[:1, None], both[1:, None]]):
        assert torch.equal(to_pixels(read_masks(value), 16, 24)[:, 0], both)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (ALPHA, "transparent in places"),
        (np.full((8, 8), -1.0), "floats from -1"),
        (np.full((8, 8), 300), "numbers from 300"),
        (np.full((8, 8), np.nan), "floats from nan"),
        (np.zeros((8, 8, 4), np.float32), "four channels"),
    ],
)
def test_what_is_no_mask(mask, message):
    with pytest.raises(ValueError, match=message):
        read_masks(mask)
