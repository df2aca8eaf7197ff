"""FID and CLIP score of painted images, by torchmetrics, with networks that the user gives.

FID compares what a network sees in painted images with what it sees in real ones. The network is either Inception (the
usual FID; torch-fidelity has it) or any vision model of transformers, such as CLIP or DINOv2 (then "FD"). Features are
computed once; torchmetrics makes the distance of them, also for the resampled sets that give the interval.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from ..batch.rows import InputRow
from .questions import LANGUAGES, language_of
from .running import read_identified, text_fault
from .statistics import CONFIDENCE, Estimate, mean


if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

# What a line of painted captions has.
IMAGE_FIELDS = ("file",)
RESULTS_NAME = "images.jsonl"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

Features = Callable[[Sequence[PIL.Image.Image]], torch.Tensor]


def read_captions(path: str | os.PathLike, limit: int | None = None) -> list[InputRow]:
    """Captions `{"id", "caption", optionally "language" and "seed"}`, one a line, as rows that can be painted.

    Raises:
        ValueError: for lines that are no captions, naming file and line.
        OSError: if the file can't be read.
    """

    def fault(values: dict[str, Any]) -> str | None:
        if values.get("language") not in (None, *LANGUAGES):
            return f'"language" is one of {", ".join(LANGUAGES)}, got {values["language"]!r:.40}'
        return text_fault(values, "caption")

    def painted(row: InputRow) -> InputRow:
        caption = row.values["caption"]
        return replace(row, values={"language": language_of(caption), **row.values, "prompt": caption})

    return [painted(row) for row in read_identified(path, "id", fault)[:limit]]


def import_torchmetrics() -> None:
    """Raises `ImportError` if torchmetrics isn't installed."""
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise ImportError('FID and CLIP score need torchmetrics: pip install -c constraints.txt ".[eval]".') from error


# ------------------------------------------------------------------------------------------------------------ features


def vision_features(folder: str | os.PathLike, device: torch.device) -> Features:
    """Image -> features of a transformers vision model (CLIP, Chinese-CLIP, DINOv2, SigLIP ...) of a local folder.

    Raises:
        OSError: if there is no such model.
    """
    from transformers import AutoImageProcessor, AutoModel

    check_folder(folder)
    model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to(device).eval()
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    @torch.no_grad()
    def features(images: Sequence[PIL.Image.Image]) -> torch.Tensor:
        pixel_values = processor(images=list(images), return_tensors="pt")["pixel_values"].to(device, model.dtype)
        find = getattr(model, "get_image_features", model)
        return find(pixel_values=pixel_values).pooler_output

    return features


def check_inception(weights: str | os.PathLike) -> None:
    """Whether [`inception_features`] can work with a file; see there for the errors."""
    try:
        state_dict = torch.load(weights, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises several kinds
        raise ValueError(f"{weights} is no file of weights alone: {str(error).splitlines()[0]}") from error
    if not isinstance(state_dict, dict) or "Conv2d_1a_3x3.conv.weight" not in state_dict:
        raise ValueError(f"{weights} holds no weights of FID's Inception network.")
    if find_spec("torch_fidelity") is None:
        raise ImportError(
            "Inception's features need torch-fidelity: pip install torch-fidelity (it brings torchvision). Or give a "
            "vision model of transformers with --features."
        )


def inception_features(weights: str | os.PathLike, device: torch.device) -> Features:
    """Image -> the 2048 features of the usual FID, by torch-fidelity's network.

    Args:
        weights: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`.

    Raises:
        ImportError: if torch-fidelity isn't installed.
        ValueError: if the file holds more than tensors, or others.
        OSError: if it can't be read.
    """
    check_inception(weights)
    from torchmetrics.image.fid import NoTrainInceptionV3

    # It reads the file without restrictions, which is safe only for what was just read with them.
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], os.fspath(weights)).to(device).eval()

    @torch.no_grad()
    def features(images: Sequence[PIL.Image.Image]) -> torch.Tensor:
        # One by one: the network resizes them itself, and they may differ in size.
        pixels = [torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] for image in images]
        return torch.cat([network(image.to(device)) for image in pixels])

    return features


def check_folder(folder: str | os.PathLike) -> None:
    """Raises `OSError` unless it is a local model: nothing is fetched for an evaluation."""
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no folder of a transformers model: it has no config.json.")


def open_images(paths: Iterable[Path]) -> Iterator[PIL.Image.Image]:
    """Yields RGB images.

    Raises:
        OSError: for a file that is no picture, naming it.
    """
    for path in paths:
        try:
            with PIL.Image.open(path) as image:
                yield image.convert("RGB")
        except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise OSError(f"{path} is no picture that can be read: {error}") from error


def list_images(folder: str | os.PathLike) -> list[Path]:
    """The pictures of a folder and those below it, sorted.

    Raises:
        OSError: if there are none.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)}).")
    return paths


def extract(features: Features, paths: Sequence[Path], batch_size: int, name: str) -> torch.Tensor:
    """Features of pictures, fp64 `(pictures, width)` on the CPU."""
    parts, batch = [], []
    with tqdm(total=len(paths), unit="image", desc=name, disable=None) as progress:
        for image in open_images(paths):
            batch.append(image)
            if len(batch) == batch_size or len(batch) + progress.n == len(paths):
                parts.append(features(batch).double().cpu())
                progress.update(len(batch))
                batch = []
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------------------- metrics


class _Given(torch.nn.Module):
    """The features themselves, for a metric that expects a network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: torch.Tensor, painted: torch.Tensor, seed: int = 0, resamples: int = 20) -> Estimate:
    """The Fréchet distance of two sets of features `(images, width)`.

    The interval is normal, from the spread over resampled painted images: resampling itself adds to the distance, so
    that the resampled distances don't lie around the true one.

    Raises:
        ValueError: for fewer than two images of a set, or two resamples.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(real), len(painted)) < 2:
        raise ValueError(f"FID needs two images at least, got {len(real)} real and {len(painted)} painted ones.")
    if resamples < 2:
        raise ValueError(f"There is no spread of {resamples} resampled distances: 2 are needed at least.")
    metric = FrechetInceptionDistance(_Given(real.shape[1]), reset_real_features=False).set_dtype(torch.float64)
    metric.update(real, real=True)

    value = _distance(metric, painted)
    rng = np.random.default_rng(seed)
    others = [
        _distance(metric, painted[torch.from_numpy(rng.integers(0, len(painted), len(painted)))])
        for _ in tqdm(range(resamples), desc="FID", unit="resample", disable=None)
    ]
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * float(np.std(others, ddof=1))
    return Estimate(value, max(0.0, value - reach), value + reach, len(painted))


def _distance(metric: FrechetInceptionDistance, painted: torch.Tensor) -> float:
    metric.reset()
    metric.update(painted, real=False)
    return float(metric.compute())


class _ClipModel:
    """A CLIP of today's transformers as torchmetrics calls one: its methods return tensors."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.config = model.config

    def to(self, device: torch.device) -> _ClipModel:
        return self

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output.float()

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        input_ids, attention_mask = input_ids.to(self.model.device), attention_mask.to(self.model.device)
        return self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output.float()


class ClipScorer:
    """CLIP scores (100 · cosine, not below 0) by a CLIP or Chinese-CLIP of a local folder.

    Raises:
        OSError: if there is no such model.
    """

    def __init__(self, folder: str | os.PathLike, device: torch.device):
        from transformers import AutoModel, AutoProcessor

        check_folder(folder)
        model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not hasattr(model, "get_text_features"):
            raise ValueError(f"{folder} holds a {type(model).__name__}; CLIP scores need a CLIP or Chinese-CLIP.")
        self._parts = (
            _ClipModel(model.to(device).eval()),
            AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        )

    @torch.no_grad()
    def score(self, image: PIL.Image.Image, caption: str) -> float:
        from torchmetrics.functional.multimodal import clip_score

        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        return float(clip_score(pixels, caption, lambda: self._parts))


def clip_scores(
    scorers: Mapping[str, ClipScorer], paths: Sequence[Path], captions: Sequence[str], languages: Sequence[str]
) -> list[float | None]:
    """The score of every picture and its caption; None where its language has no scorer."""
    pairs = zip(open_images(paths), captions, languages, strict=True)
    return [
        scorers[language].score(image, caption) if language in scorers else None
        for image, caption, language in tqdm(pairs, total=len(paths), desc="CLIP", unit="image", disable=None)
    ]


def measure(
    rows: Sequence[InputRow],
    painted: Mapping[str, dict[str, Any]],
    folder: Path,
    *,
    real: str | os.PathLike | None = None,
    features: Features | None = None,
    clip: Mapping[str, ClipScorer] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    resamples: int = 20,
) -> dict[str, Any]:
    """FID and CLIP score of painted captions, for each language and for all.

    Args:
        rows: the captions.
        painted: their lines, by their keys; captions without an image are left out.
        folder: of the images.
        real: folder of real pictures, with `features` for FID.
        clip: a scorer per language. Different scorers' scores are not comparable, so that there is a mean over all
            languages only where they share one.
    """
    rows = [row for row in rows if "file" in painted.get(row.key, {})]
    if not rows:
        raise ValueError("No caption has an image, so there is nothing to measure.")
    paths = [folder / painted[row.key]["file"] for row in rows]
    languages = [row.values["language"] for row in rows]
    real_features = fake_features = None
    if features is not None:
        real_features = extract(features, list_images(real), batch_size, "real")
        fake_features = extract(features, paths, batch_size, "painted")
    scores: list[float | None] = [None] * len(rows)
    if clip:
        scores = clip_scores(clip, paths, [row.values["caption"] for row in rows], languages)
    is_one_scorer = clip is not None and len({id(clip.get(language)) for language in languages}) == 1
    results: dict[str, Any] = {}
    for group in (*dict.fromkeys(languages), "all"):
        chosen = [index for index, language in enumerate(languages) if group in (language, "all")]
        figures: dict[str, Any] = {"images": len(chosen)}
        if features is not None and len(chosen) >= 2:
            figures["fid"] = frechet_distance(real_features, fake_features[chosen], seed, resamples).as_dict()
        own = [scores[index] for index in chosen]
        if None not in own and (group != "all" or is_one_scorer):
            figures["clip_score"] = mean(own, seed).as_dict()
        results[group] = figures
    return results
