"""The image processor against the reference and against PIL, and what it refuses."""

import base64
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.image_utils import load_image

from viscpm_hf.modeling.image_processing_viscpm import VisCPMImageProcessor


GOLDEN = Path(__file__).parents[1] / "golden"


def random_image(width: int = 61, height: int = 43, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, format: str = "PNG", **kwargs) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def reference(image: Image.Image, size: int = 224) -> torch.Tensor:
    pixels = np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return ((torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - 0.5) / 0.5)[None]


@pytest.fixture
def processor() -> VisCPMImageProcessor:
    return VisCPMImageProcessor()


def preprocess(processor, images, **kwargs) -> torch.Tensor:
    return processor(images, return_tensors="pt", **kwargs)["pixel_values"]


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("case", ["chat_a", "chat_b"])
def test_equals_the_reference(case, index):
    size = json.loads((GOLDEN / case / "vision.json").read_text())["image_size"]
    expected = load_file(GOLDEN / case / "expected.safetensors")[f"image_{index}.pixel_values"]
    processor = VisCPMImageProcessor(size={"height": size, "width": size})
    pixel_values = preprocess(processor, Image.open(GOLDEN / case / f"image_{index}.png"))
    torch.testing.assert_close(pixel_values, expected[None], atol=1e-6, rtol=0)


def test_every_kind_of_input_is_the_same_image(processor, tmp_path):
    image = random_image()
    path = tmp_path / "image.png"
    image.save(path)
    pixels = np.array(image)
    expected = reference(image)
    assert torch.equal(preprocess(processor, image), expected)
    inputs = [
        path,
        str(path),
        path.read_bytes(),
        base64.b64encode(path.read_bytes()).decode(),
        "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        load_image(str(path)),
        pixels,
        pixels.transpose(2, 0, 1),
        pixels[None],
        torch.from_numpy(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1),
        [[image]],
    ]
    for image in inputs:
        assert torch.equal(preprocess(processor, image), expected)


def test_output_is_float32_contiguous_and_in_range(processor):
    pixel_values = preprocess(processor, random_image())
    assert pixel_values.shape == (1, 3, 224, 224) and pixel_values.dtype == torch.float32
    assert pixel_values.is_contiguous() and pixel_values.abs().max() <= 1
    array = processor(random_image(), return_tensors="np")["pixel_values"]
    assert array.dtype == np.float32 and np.array_equal(array, pixel_values.numpy())


def test_batch_of_different_sizes_and_modes(processor):
    images = [random_image(61, 43), random_image(300, 20, "L"), random_image(2, 500, "RGBA"), random_image(224, 224)]
    batch = preprocess(processor, images)
    assert torch.equal(batch, torch.cat([reference(image) for image in images]))
    nested = preprocess(processor, [images[:1], images[1:], []])
    assert torch.equal(nested, batch)
    as_batch = preprocess(processor, np.stack([np.array(images[0])] * 2))
    assert torch.equal(as_batch, batch[:1].repeat(2, 1, 1, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_modes_are_converted_as_pil_does(processor, mode):
    image = random_image().convert("L").convert("PA") if mode == "PA" else random_image(mode=mode)
    assert torch.equal(preprocess(processor, image), reference(image))


def test_transparency_is_dropped(processor):
    """As in the 2023 release; transformers' own conversion would lay the image on white."""
    image = random_image()
    transparent = image.copy()
    transparent.putalpha(7)
    assert torch.equal(preprocess(processor, transparent), reference(image))
    assert torch.equal(preprocess(processor, np.array(transparent)), reference(image))


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_images_keep_their_contrast(processor, dtype):
    grey = np.array(random_image(mode="L"))
    image = Image.frombytes(
        "I;16" if dtype == "<u2" else "I;16B", grey.shape[::-1], (grey * 257.0).astype(dtype).tobytes()
    )
    assert torch.equal(preprocess(processor, image), reference(Image.fromarray(grey)))
    if dtype == "<u2":
        assert torch.equal(preprocess(processor, encode(image)), reference(Image.fromarray(grey)))


def test_grey_arrays(processor):
    image = random_image(mode="L")
    for array in (np.array(image), np.array(image)[None], np.array(image)[..., None], torch.tensor(np.array(image))):
        assert torch.equal(preprocess(processor, array), reference(image))


def test_float_arrays_follow_transformers(processor):
    """0..1 with `do_rescale=False`, as every image processor of transformers has it."""
    array = np.array(random_image()).astype(np.float32) / 255
    pixel_values = preprocess(processor, array, do_rescale=False)
    torch.testing.assert_close(pixel_values, reference(random_image()), atol=1e-5, rtol=0)


def test_files_are_turned_upright_and_images_left_alone(processor):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: lying on its side
    data = encode(random_image(), exif=exif)
    assert torch.equal(preprocess(processor, data), reference(random_image().transpose(Image.Transpose.ROTATE_270)))
    assert torch.equal(preprocess(processor, Image.open(BytesIO(data))), reference(random_image()))


def test_options(processor):
    image = random_image()
    pixel_values = preprocess(processor, image, size={"height": 32, "width": 48}, do_normalize=False)
    expected = np.array(image.resize((48, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert torch.equal(pixel_values[0], torch.from_numpy(expected).float() / 255)
    unresized = preprocess(processor, random_image(224, 224), do_resize=False)
    assert torch.equal(unresized, reference(random_image(224, 224)))
    assert preprocess(processor, image, do_resize=False).shape == (1, 3, 43, 61)
    shortest_edge = preprocess(processor, image, size={"shortest_edge": 43})
    assert shortest_edge.shape == (1, 3, 43, 61)
    kept = preprocess(processor, image.convert("L"), do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
    assert kept.shape == (1, 1, 224, 224)


def test_saved_equals_loaded(tmp_path):
    processor = VisCPMImageProcessor(size={"height": 48, "width": 32}, min_image_side=3, max_image_pixels=10_000)
    processor.save_pretrained(tmp_path)
    loaded = VisCPMImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.min_image_side, loaded.max_image_pixels) == (3, 10_000)
    assert torch.equal(preprocess(loaded, random_image()), preprocess(processor, random_image()))


@pytest.mark.parametrize("image", [3, None, {"image": 1}, object()])
def test_no_image_is_refused(processor, image):
    for images in (image, [random_image(), image]):
        with pytest.raises(ValueError, match=f"Expected an image .*got {type(image).__name__}"):
            processor(images)


def test_nothing_is_refused(processor):
    for images in ([], [[]]):
        with pytest.raises(ValueError, match="at least one image, but got 0"):
            processor(images)


def test_wrong_arrays_are_refused(processor):
    with pytest.raises(ValueError, match=r"1, 3 or 4 channels.*\(10, 10, 2\)"):
        processor(np.zeros((10, 10, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"dimensions.*\(10,\)"):
        processor(np.zeros(10))


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (1, 1)])
def test_too_small_images_are_refused(processor, size):
    width, height = size
    message = rf"{height}x{width} pixels, .*at least 2 pixels \(`min_image_side`\)"
    with pytest.raises(ValueError, match=message):
        processor(Image.new("RGB", size))
    with pytest.raises(ValueError, match=message):
        processor(np.zeros((height, width, 3), dtype=np.uint8), input_data_format="channels_last")
    assert preprocess(processor, Image.new("RGB", size), min_image_side=1).shape == (1, 3, 224, 224)


def test_too_large_images_are_refused_before_decoding(processor, tmp_path, monkeypatch):
    data = encode(Image.new("1", (15_000, 12_000)))  # 22 KB
    message = r"12000x15000 = 180000000 pixels, but at most 178956970 .*`max_image_pixels`"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    (tmp_path / "large.png").write_bytes(data)
    for image in (Image.open(BytesIO(data)), data, tmp_path / "large.png", str(tmp_path / "large.png")):
        with pytest.raises(ValueError, match=message):
            processor(image)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pil_own_limit_is_a_clear_error(processor):
    with pytest.raises(ValueError, match="too many pixels for PIL.*180000000 pixels"):
        processor(encode(Image.new("1", (15_000, 12_000))))


def test_limit_can_be_changed(processor):
    image = random_image(20, 10)
    with pytest.raises(ValueError, match="10x20 = 200 pixels, but at most 199"):
        processor(image, max_image_pixels=199)
    with pytest.raises(ValueError, match="10x20 = 200 pixels, but at most 199"):
        VisCPMImageProcessor(max_image_pixels=199)(encode(image))
    assert preprocess(processor, image, max_image_pixels=200).shape == (1, 3, 224, 224)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_files_are_refused(processor, format, tmp_path):
    data = encode(random_image(200, 200), format)
    data = data[: len(data) // 2]
    path = tmp_path / "image"
    path.write_bytes(data)
    images = [data, str(path), path, base64.b64encode(data).decode()]
    if format != "WEBP":  # which PIL does not open at all
        images.append(Image.open(BytesIO(data)))
    for image in images:
        with pytest.raises(ValueError, match="image file is truncated or damaged|is (not|neither) an image file"):
            processor(image)


def test_a_truncated_png_is_called_truncated(processor, tmp_path):
    data = encode(random_image(200, 200))[:-5000]
    path = tmp_path / "image.png"
    path.write_bytes(data)
    for image in (Image.open(path), data, str(path), base64.b64encode(data).decode()):
        with pytest.raises(ValueError, match="The image file is truncated or damaged"):
            processor(image)


def test_a_wrong_checksum_is_called_damage(processor):
    data = bytearray(encode(random_image(200, 200)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ValueError, match="truncated or damaged"):
        processor(bytes(data))


def test_what_is_no_image_file(processor, tmp_path):
    path = tmp_path / "text.png"
    path.write_text("not an image")
    for source in (path, str(path), path.read_bytes()):
        with pytest.raises(ValueError, match="is not an image file that PIL can read"):
            processor(source)
    with pytest.raises(ValueError, match="There is no image file .*missing.png"):
        processor(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="missing.png' is neither an image file, nor a URL"):
        processor(str(tmp_path)[-20:] + "/missing.png")
    with pytest.raises(ValueError) as error:
        processor("A" * 100_000)
    assert len(str(error.value)) < 300
