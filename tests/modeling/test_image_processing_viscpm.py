"""The image processor against the reference and against PIL, and what it refuses."""

import base64
import http.server
import json
import struct
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers.image_utils import load_image

from viscpm_hf.modeling.image_processing_viscpm import VisCPMImageProcessor
from viscpm_hf.modeling.processing_viscpm_chat import VisCPMChatProcessor
from viscpm_hf.modeling.tokenization_cpm_bee import CpmBeeTokenizer


GOLDEN = Path(__file__).parents[1] / "golden"


def random_image(width: int = 61, height: int = 43, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, format: str = "PNG", **kwargs) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def reference(image: Image.Image, size: int = 224) -> torch.Tensor:
    """With the order of passes of the Pillow that the original pins."""
    across = image.convert("RGB").resize((size, image.height), Image.Resampling.BICUBIC)
    pixels = np.array(across.resize((size, size), Image.Resampling.BICUBIC))
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


# ---------------------------------------------------------------------------------- what the original made of files

# What the original saw otherwise: photographs lying on their side, and values above 255 (or of 0..1) cut.
DIFFERENT = ("exif2.jpg", "exif6.jpg", "gray16.png", "gray16_dark.png", "float.tiff", "int32.tiff")
RECORDED = load_file(GOLDEN / "images" / "levels.safetensors")


@pytest.mark.parametrize("name", [name for name in sorted(RECORDED) if name not in DIFFERENT])
def test_files_have_the_pixels_that_the_original_made(name):
    """Recorded with Pillow 9.5: pictures of all modes, tall ones, of one pixel."""
    processor = VisCPMImageProcessor(size={"height": 32, "width": 32}, min_image_side=1)
    expected = (RECORDED[name].float() / 255 - 0.5) / 0.5
    for image in (GOLDEN / "images" / name, Image.open(GOLDEN / "images" / name)):
        torch.testing.assert_close(preprocess(processor, image)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [{"height": 32, "width": 32}, {"shortest_edge": 32}])
@pytest.mark.parametrize("shape", [(20, 200), (3, 400), (200, 20), (90, 100)])
def test_horizontal_pass_comes_first(size, shape):
    """As in all Pillows up to 12 but for the longest images; 13 turns the passes round for tall ones."""
    image = random_image(*shape)
    levels = VisCPMImageProcessor(size=size, do_rescale=False, do_normalize=False)(image)["pixel_values"][0]
    height, width = levels.shape[1:]
    across = np.array(image.resize((width, image.height), Image.Resampling.BICUBIC))
    # Rows of one pixel: nothing is left to be put in another order.
    columns = [Image.fromarray(across[:, [x]]).resize((1, height), Image.Resampling.BICUBIC) for x in range(width)]
    assert np.array_equal(np.moveaxis(levels, 0, -1), np.concatenate([np.array(column) for column in columns], 1))


# --------------------------------------------------------------------------------------------------- more than 8 bits

GREY = np.array(random_image(mode="L"))


def pgm(values: np.ndarray, white: int) -> bytes:
    return b"P5 %d %d %d\n" % (*values.shape[::-1], white) + values.astype(">u2").tobytes()


def wide(dtype: str = "<u2", factor: int = 257) -> np.ndarray:
    return (GREY.astype(np.int64) * factor).astype(dtype)


@pytest.mark.parametrize(
    ("source", "levels"),
    [
        (encode(Image.fromarray(wide())), GREY),
        (encode(Image.fromarray(wide(factor=2)), "PNG"), wide(factor=2) >> 8),  # a dark picture stays dark
        (encode(Image.fromarray(wide()), "TIFF"), GREY),
        (encode(Image.fromarray(wide()), "TIFF", compression="tiff_lzw"), GREY),
        (encode(Image.fromarray(wide()), "JPEG2000"), GREY),
        (pgm(wide(), 65535), GREY),
        (pgm(GREY.astype(int) * 4, 1020), GREY),
        (encode(Image.fromarray(wide("<i4")), "TIFF"), GREY),
        (encode(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"), GREY),
        (Image.frombytes("I;16B", GREY.shape[::-1], wide(">u2").tobytes()), GREY),
        (Image.fromarray(wide("<i4")), GREY),
        (Image.fromarray(GREY.astype(np.int32)), GREY),
        (Image.fromarray((GREY / 255).astype(np.float32)), GREY),
        (Image.fromarray(GREY.astype(np.float32)), GREY),
    ],
)
def test_files_and_images_keep_their_contrast(processor, source, levels):
    assert torch.equal(preprocess(processor, source), reference(Image.fromarray(levels.astype(np.uint8))))
    if isinstance(source, bytes):
        assert torch.equal(preprocess(processor, Image.open(BytesIO(source))), preprocess(processor, source))
        assert torch.equal(preprocess(processor, base64.b64encode(source).decode()), preprocess(processor, source))


RGB = np.array(random_image())


@pytest.mark.parametrize(
    "array",
    [
        (RGB / 255).astype(np.float64),
        (RGB / 255).astype(np.float32) * np.float32(1.0001),  # rounding
        torch.tensor(RGB).permute(2, 0, 1) / 255,
        (torch.tensor(RGB).permute(2, 0, 1) / 255).requires_grad_(),
        RGB.astype(np.float32),
        RGB.astype(np.int64),
        RGB.astype(np.int16),
        RGB.astype(np.uint16) * np.uint16(257),
        (RGB.astype(np.int32) * 257).transpose(2, 0, 1),
        np.concatenate([RGB, RGB[..., :1]], -1) / 255,
    ],
)
def test_arrays_of_other_numbers_are_the_same_image(processor, array):
    assert torch.equal(preprocess(processor, array), reference(Image.fromarray(RGB)))


def test_arrays_of_booleans_are_black_and_white(processor):
    expected = reference(Image.fromarray((GREY > 100).astype(np.uint8) * 255))
    for array in (GREY > 100, torch.tensor(GREY > 100)[None]):
        assert torch.equal(preprocess(processor, array), expected)


def with_white(value: float, dtype: type) -> np.ndarray:
    array = np.zeros((8, 8), dtype=dtype)
    array[2, 3] = value
    return array


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (with_white(-0.5, np.float32), r"float32 has values from -0.5 to 0, but floats are read as 0..1 or as 0..255"),
        (with_white(1.5, np.float32), "from 0 to 1.5, but floats"),
        (with_white(256, np.float32), "from 0 to 256, but floats"),
        (with_white(np.nan, np.float32), "from nan to nan, but floats"),
        (with_white(-1, np.int32), "int32 has values from -1 to 0, from which its white can't be known"),
        (with_white(1000, np.int32), "from 0 to 1000, from which"),
        (with_white(255, np.uint16), "from 0 to 255, from which"),
        (with_white(70_000, np.int32), "from 0 to 70000, from which"),
        (with_white(1j, np.complex64), "complex64 isn't supported"),
        (Image.fromarray(with_white(70_000, np.int32)), "mode I has values from 0 to 70000"),
        (Image.fromarray(with_white(2, np.float32)), "mode F has values from 0 to 2"),
        (GOLDEN / "images" / "int32.tiff", "mode I has values from 0 to 127500"),
    ],
)
def test_values_of_unknown_white_are_refused(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor(image)


def test_tiffs_whose_zero_is_white_are_refused(processor):
    data = bytearray(encode(Image.fromarray(wide()), "TIFF"))
    entry = data.index(bytes([6, 1, 3, 0, 1, 0, 0, 0, 1, 0]))  # PhotometricInterpretation, one short: black is zero
    data[entry + 8] = 0
    with pytest.raises(ValueError, match="WhiteIsZero"):
        processor(bytes(data))


def test_grey_arrays(processor):
    image = random_image(mode="L")
    for array in (np.array(image), np.array(image)[None], np.array(image)[..., None], torch.tensor(np.array(image))):
        assert torch.equal(preprocess(processor, array), reference(image))


def test_floats_without_rescaling(processor):
    """0..1 with `do_rescale=False`, as every image processor of transformers has it."""
    array = np.array(random_image()).astype(np.float32) / 255
    for options in ({"do_rescale": False}, {"rescale_factor": 1.0}):
        pixel_values = preprocess(processor, array, **options)
        torch.testing.assert_close(pixel_values, reference(random_image()), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------- upright

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def oriented(orientation: int, format: str = "PNG", image: Image.Image | None = None, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image or random_image(), format, exif=exif, **options)


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("JPEG", {})],
)
@pytest.mark.parametrize("orientation", TURNS)
def test_photographs_are_upright_however_they_are_given(processor, orientation, format, options):
    data = oriented(orientation, format, **options)
    upright = random_image() if format != "JPEG" else Image.open(BytesIO(encode(random_image(), "JPEG")))
    expected = reference(upright.transpose(TURNS[orientation]))
    given = Image.open(BytesIO(data))
    decoded = Image.open(BytesIO(data))
    decoded.load()
    for image in (data, given, decoded, ImageOps.exif_transpose(Image.open(BytesIO(data)))):
        assert torch.equal(preprocess(processor, image), expected)
    assert torch.equal(preprocess(processor, given), expected)  # it was left as it is


def test_deep_photographs_are_upright_too(processor):
    expected = reference(Image.fromarray(GREY).transpose(TURNS[6]))
    for format in ("PNG", "TIFF"):
        assert torch.equal(preprocess(processor, oriented(6, format, Image.fromarray(wide()))), expected)


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_orientations_that_mean_nothing(processor, orientation):
    assert torch.equal(preprocess(processor, oriented(orientation)), reference(random_image()))


def test_damaged_exif_data_does_not_spoil_the_image(processor):
    image = random_image()
    data = encode(image, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 3)
    assert torch.equal(preprocess(processor, data), reference(image))


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
    assert torch.equal(kept, reference(image.convert("L"))[:, :1])
    with pytest.raises(ValueError, match="one of the modes L, RGB, RGBA, got P"):
        processor(image.convert("P"), do_convert_rgb=False)


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
    strict = VisCPMImageProcessor(max_image_pixels=199)
    assert preprocess(strict, [encode(image), image], max_image_pixels=200).shape == (2, 3, 224, 224)
    chat = VisCPMChatProcessor(strict, CpmBeeTokenizer(str(GOLDEN / "chat_a" / "vocab.txt")))
    inputs = chat(text="<image>what?", images=[encode(image)], max_image_pixels=200, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 224, 224)


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


def test_the_table_of_the_docs(processor):
    """Every value that `docs/images.md` names."""
    examples = [
        (np.ones((4, 4), dtype=bool), 255),
        (np.full((4, 4), 77, np.uint8), 77),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 7)), (10, 20, 30)),
        (Image.new("LA", (4, 4), (10, 7)), 10),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (encode(Image.fromarray(np.full((4, 4), 25700, np.uint16))), 100),
        (encode(Image.fromarray(np.full((4, 4), 65535, np.uint16))), 255),
        (pgm(np.full((4, 4), 1000), 1000), 255),
        (np.full((4, 4), 100, np.int32), 100),
        (np.zeros((4, 4), np.uint16), 0),
        (np.full((4, 4), 25700, np.int32), 100),
        (np.full((4, 4), 0.5), 128),
        (np.full((4, 4), 100.7), 100),
    ]
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([value for index in range(4) for value in (index, 2 * index, 50)])
    examples.append((palette, (3, 6, 50)))
    transparent = Image.open(BytesIO(encode(palette, transparency=3)))
    assert "transparency" in transparent.info
    examples.append((transparent, (3, 6, 50)))
    for image, expected in examples:
        levels = ((preprocess(processor, image)[0, :, 100, 100] + 1) * 127.5).round()
        assert levels.tolist() == list(np.broadcast_to(expected, 3)), image


def test_12_bit_tiffs(processor):
    """PIL reads them, but can't write them."""
    values = np.array([[0, 4095], [1600, 16]])
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values)
    entries = [(256, 2), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, len(packed))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    offset = 8 + len(packed) + len(packed) % 2
    data = struct.pack("<2sHI", b"II", 42, offset) + packed.ljust(offset - 8, b"\0")
    data += struct.pack("<H", len(entries)) + directory + bytes(4)
    assert torch.equal(preprocess(processor, data), reference(Image.fromarray((values >> 4).astype(np.uint8))))


def test_addresses(processor):
    """A URL's file is read as any other; one that can't be had is one sentence."""
    data = oriented(6, "PNG", Image.fromarray(wide()))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/image.png" else 404)
            self.end_headers()
            self.wfile.write(data if self.path == "/image.png" else b"")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert torch.equal(preprocess(processor, f"{address}/image.png"), preprocess(processor, data))
        with pytest.raises(ValueError, match="could not be fetched from .*404"):
            processor(f"{address}/other.png")
        server.shutdown()
