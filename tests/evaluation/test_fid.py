"""Painted captions measured by networks of local folders; torchmetrics' figures are checked by hand."""

import json
from importlib.util import find_spec

import numpy as np
import paint_support
import pytest
import torch
from paint_support import PAINT
from PIL import Image

from viscpm_hf.cli.main import main
from viscpm_hf.evaluation.fid import (
    ClipScorer,
    frechet_distance,
    inception_features,
    list_images,
    measure,
    read_captions,
    vision_features,
)
from viscpm_hf.evaluation.report import fingerprint


MODEL = str(PAINT / "pytorch_model.bin")
SHORT = ("--device", "cpu", "--steps", "2", "--batch-size", "2")
CAPTIONS = [
    {"id": "a", "caption": "蓝色"},
    {"id": "b", "caption": "a red circle"},
    {"id": "c", "caption": "落红"},
    {"id": "d", "caption": "a cat"},
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random Chinese-CLIP in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    for part in paint_support.ranker(folder).values():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    (folder / "more").mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        pixels = rng.integers(0, 255, (20 + index, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if index % 2 else ".") / f"{index}.png")
    return folder


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in CAPTIONS), "utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------- figures


def matrix_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T


def test_frechet_distance_is_that_of_the_two_normal_distributions():
    rng = np.random.default_rng(0)
    real, painted = rng.normal(0, 1, (300, 6)), rng.normal(0.3, 1.5, (200, 6)) @ rng.normal(0, 1, (6, 6))
    one, two = np.cov(real, rowvar=False), np.cov(painted, rowvar=False)
    root = matrix_root(matrix_root(one) @ two @ matrix_root(one))
    difference = real.mean(0) - painted.mean(0)
    expected = difference @ difference + np.trace(one + two - 2 * root)
    estimate = frechet_distance(torch.from_numpy(real), torch.from_numpy(painted), resamples=10)
    assert estimate.value == pytest.approx(expected, rel=1e-6)
    assert estimate.low < estimate.value < estimate.high and estimate.count == 200
    assert frechet_distance(torch.from_numpy(real), torch.from_numpy(real), resamples=2).value < 1e-6


def test_frechet_distance_needs_images():
    with pytest.raises(ValueError, match="got 5 real and 1 painted"):
        frechet_distance(torch.randn(5, 2), torch.randn(1, 2))
    with pytest.raises(ValueError, match="2 are needed"):
        frechet_distance(torch.randn(5, 2), torch.randn(5, 2), resamples=1)


def test_clip_score_is_the_cosine(clip, real):
    from transformers import ChineseCLIPModel, ChineseCLIPProcessor

    model, processor = ChineseCLIPModel.from_pretrained(clip), ChineseCLIPProcessor.from_pretrained(clip)
    image = Image.open(list_images(real)[0]).convert("RGB")
    with torch.no_grad():
        inputs = processor(text=["蓝色猫"], images=[image], return_tensors="pt", padding=True)
        cosine = model(**inputs).logits_per_image / model.logit_scale.exp()
    scorer = ClipScorer(clip, torch.device("cpu"))
    assert scorer.score(image, "蓝色猫") == pytest.approx(max(0.0, 100 * float(cosine)), abs=1e-3)
    assert 0 <= scorer.score(image, "猫" * 100) <= 100  # longer than the model takes


def test_features_are_the_models(clip, real):
    from transformers import AutoImageProcessor, ChineseCLIPModel

    images = [Image.open(path).convert("RGB") for path in list_images(real)]
    pixels = AutoImageProcessor.from_pretrained(clip)(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = ChineseCLIPModel.from_pretrained(clip).get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(vision_features(clip, torch.device("cpu"))(images), expected)


def test_vision_models_without_text(tmp_path, real):
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)).save_pretrained(tmp_path)  # fmt: skip  # noqa: E501
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    images = [Image.open(path).convert("RGB") for path in list_images(real)]
    assert vision_features(tmp_path, torch.device("cpu"))(images).shape == (5, 16)
    with pytest.raises(ValueError, match="CLIP or Chinese-CLIP"):
        ClipScorer(tmp_path, torch.device("cpu"))


class _NotTensors:
    def __reduce__(self):
        return (exec, ("raise SystemExit('pickled code ran')",))


def test_inception_weights_are_read_without_running_code(tmp_path):
    device = torch.device("cpu")
    torch.save({"Conv2d_1a_3x3.conv.weight": _NotTensors()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="no file of weights alone"):
        inception_features(tmp_path / "evil.pth", device)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no weights of FID's Inception"):
        inception_features(tmp_path / "other.pth", device)
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.ones(1)}, tmp_path / "inception.pth")
    if find_spec("torch_fidelity") is None:
        with pytest.raises(ImportError, match="pip install torch-fidelity"):
            inception_features(tmp_path / "inception.pth", device)
    with pytest.raises(FileNotFoundError):
        inception_features(tmp_path / "none.pth", device)


def test_one_mean_over_languages_only_by_one_scorer(clip, real):
    paths = list_images(real)
    rows = [_caption(str(index), language) for index, language in enumerate(("en", "zh", "en", "zh"))]
    painted = {row.key: {"file": str(path)} for row, path in zip(rows, paths, strict=False)}
    one, other = (ClipScorer(clip, torch.device("cpu")) for _ in range(2))
    both = measure(rows, painted, real, clip={"en": one, "zh": one})
    assert [both[group]["clip_score"]["count"] for group in ("en", "zh", "all")] == [2, 2, 4]
    assert "clip_score" not in measure(rows, painted, real, clip={"en": one, "zh": other})["all"]
    only = measure(rows, painted, real, clip={"zh": one})
    assert "clip_score" in only["zh"] and "clip_score" not in only["en"] and "clip_score" not in only["all"]
    with pytest.raises(ValueError, match="No caption has an image"):
        measure(rows, {}, real, clip={"en": one})


def _caption(name: str, language: str):
    from viscpm_hf.batch.rows import InputRow, row_key

    return InputRow(0, 1, row_key(name, None), name, {"caption": "猫", "language": language})


# ------------------------------------------------------------------------------------------------------------- command


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main(["eval", "fid", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_fid_and_clip_score(capsys, tmp_path, captions, clip, real):
    images = tmp_path / "images"
    command = (MODEL, "--captions", captions, "--images", images, *SHORT)
    metrics = ("--real", real, "--features", clip, "--clip", clip, "--resamples", "3")
    status, out, err = run(capsys, *command, *metrics)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["zh", "en", "all"]
    report = json.loads((images / "images.report.json").read_text("utf-8"))
    assert report["counts"] == {"rows": 4, "errors": 0, "flagged": 0, "real": 5}
    assert report["settings"]["rank"] is False and report["settings"]["steps"] == 2
    assert report["results"]["real"] == fingerprint(real) and report["results"]["resamples"] == 3
    for group, count in (("en", 2), ("zh", 2), ("all", 4)):
        figures = report["results"][group]
        assert figures["images"] == figures["fid"]["count"] == figures["clip_score"]["count"] == count
        assert figures["fid"]["low"] <= figures["fid"]["value"] <= figures["fid"]["high"]

    # Painted once; every further figure needs only the images. Each can be painted again from its seed.
    results = [json.loads(line) for line in (images / "images.jsonl").read_text("utf-8").splitlines()]
    assert [(result["id"], result["seed"]) for result in results] == [("a", 0), ("b", 1), ("c", 2), ("d", 3)]
    before = {path.name: path.stat().st_mtime_ns for path in images.glob("*.png")}
    assert len(before) == 4
    assert run(capsys, *command, "--clip", clip)[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in images.glob("*.png")} == before
    for name, value in (("seed", "1"), ("vae", "elsewhere"), ("ranker", clip)):
        status, _, err = run(capsys, *command, "--clip", clip, f"--{name}", value)
        assert status == 1 and f"other settings: {name} was " in err


def test_two_processes_paint_what_one_paints(capsys, tmp_path, captions, clip):
    command = (MODEL, "--captions", captions, *SHORT[:-1], "1", "--clip", clip)
    for name, processes in (("one", "1"), ("two", "2")):
        assert run(capsys, *command, "--images", tmp_path / name, "--num-processes", processes)[0] == 0
    one, two = (sorted((tmp_path / name).glob("*.png")) for name in ("one", "two"))
    assert len(one) == 4
    for first, second in zip(one, two, strict=True):
        assert first.name == second.name
        assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))
    reports = [json.loads((tmp_path / name / "images.report.json").read_text("utf-8")) for name in ("one", "two")]
    assert reports[0]["results"] == reports[1]["results"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to measure"),
        (("--real", "REAL"), "FID takes --real and one of --inception and --features"),
        (("--features", "CLIP"), "FID takes --real"),
        (("--real", "EMPTY", "--features", "CLIP"), "holds no pictures"),
        (("--real", "REAL", "--features", "EMPTY"), "it has no config.json"),
        (("--clip", "CLIP", "--clip", "zh=CLIP"), "two models for zh"),
        (("--clip", "en=EMPTY"), "it has no config.json"),
    ],
)
def test_wrong_metrics_are_known_before_anything_is_painted(capsys, tmp_path, captions, clip, real, options, message):
    (tmp_path / "empty").mkdir()
    places = {"REAL": str(real), "CLIP": str(clip), "EMPTY": str(tmp_path / "empty")}
    for name, place in places.items():
        options = [option.replace(name, place) for option in options]
    status, out, err = run(capsys, MODEL, "--captions", captions, "--images", tmp_path / "images", *SHORT, *options)
    assert (status, out) == (1, "")
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "images").exists()


def test_bad_captions(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"id": 1, "caption": "猫"}\n{"id": 2}\n{"id": 1, "caption": "a"}\n', "utf-8")
    with pytest.raises(ValueError, match='captions.jsonl, line 2: "caption" is a text, .*; line 3: id 1 is that of'):
        read_captions(path)
    path.write_text('{"id": 1, "caption": "猫"}\n{"id": 2, "caption": "a", "language": "zh"}\n', "utf-8")
    assert [row.values["language"] for row in read_captions(path)] == ["zh", "zh"]
    assert len(read_captions(path, limit=1)) == 1
