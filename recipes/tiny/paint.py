"""Trains `viscpm-tiny` Paint from nothing, and measures how well it draws what it is asked for.

    python recipes/tiny/paint.py --work build/tiny/paint --language-model build/tiny/chat/text \
        --output src/viscpm_hf/tiny_models/paint

1. `data`: pictures of one shape, each with a caption in either language. What the test asks for is left out.
2. `vae`: the VAE, by `picture_vae.py`.
3. `start`: a whole pipeline: the language model of `chat.py`'s first stage, that VAE, a new projection and UNet.
4. `trained`: UNet and projection, by one call of `viscpm_hf.training.train_paint`; the language model stays frozen.

A finished stage is not done again, and an interrupted training goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from packing import strip_code
from picture_vae import train_vae
from tqdm import tqdm

from viscpm_hf import (
    CpmBeeTokenizer,
    VisCPMChatForConditionalGeneration,
    VisCPMPaintPipeline,
    VisCPMPaintTextEncoder,
    VisCPMPaintTextEncoderConfig,
)
from viscpm_hf.evaluation.statistics import proportion
from viscpm_hf.paint.paint import image_grid
from viscpm_hf.pipelines.pipeline_viscpm_paint import REFERENCE_SCHEDULER_CONFIG
from viscpm_hf.shapes import (
    COLOURS,
    KINDS,
    LANGUAGES,
    PLACES,
    Scene,
    Shape,
    check_painting,
    draw,
    judged_prompts,
    make_scene,
    word_prompt,
)
from viscpm_hf.tiny.words import SHADES
from viscpm_hf.training import PaintTrainingConfig, train_paint


SEED = 2023
SIZE = 64
# Of the shapes, in parts of the picture's side: how large, how far from the middle a side is, how much that varies.
SIZES, OFFSET, JITTER = (0.4, 0.52), 0.2, 0.03
STAR_SIZES = (0.47, 0.53)  # the smallest area; guidance makes it smaller still
BACKGROUNDS = (255, 245, 235)
BEFORE, AFTER = ("", "", "", "(", "“", "：", ","), ("", "", "", ".", "。", "!", "！", "”", ")")
NUM_PICTURES, NUM_VALIDATION = 12000, 400

VAE_STEPS = 3500
NUM_VAE_PICTURES, MIN_VAE_SIZE, VAE_TEXTURES = 12000, 0.3, ("plain", "gradient")

JUDGED = 120

PROMPT_WIDTH = 96
UNET_CONFIG = {
    "sample_size": SIZE // 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [64, 80],
    "layers_per_block": 1,
    "cross_attention_dim": PROMPT_WIDTH,
    "attention_head_dim": [2, 2],
    "use_linear_projection": True,
    "norm_num_groups": 8,
}
TRAINING = {
    "mode": "full",
    "train_projection": True,
    "learning_rate": 1.5e-3,
    "max_steps": 4500,
    "batch_size": 64,
    "eval_batch_size": 100,
    "encode_batch_size": 64,
    "warmup": 100,
    "adam_beta2": 0.99,
    "ema_decay": 0.998,
    "prompt_dropout": 0.1,
    "snr_gamma": 5.0,
    "eval_steps": 500,
    "save_steps": 500,
    "keep_best": False,
    "log_steps": 50,
    "tensorboard": False,
    "bad_rows": "fail",
    "resume": True,
}


def outline(kind: str) -> list[tuple[float, float]]:
    """The plain form of a kind, upright."""
    if kind == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if kind == "triangle":
        return [(0, -1), (1, 1), (-1, 1)]
    count, inner = (48, 1.0) if kind == "circle" else (10, 0.48)
    turns = [(2 * math.pi * index / count, inner if index % 2 else 1.0) for index in range(count)]
    return [(math.sin(angle) * radius, -math.cos(angle) * radius) for angle, radius in turns]


def make_paint_scene(kind: str, colour: str, place: frozenset[str], rng: random.Random) -> Scene:
    """A shape near the middle of its place. What varies little is drawn well after little training."""
    size = rng.uniform(*(STAR_SIZES if kind == "star" else SIZES))
    x = 0.5 + OFFSET * (("right" in place) - ("left" in place)) + rng.uniform(-JITTER, JITTER)
    y = 0.5 + OFFSET * (("bottom" in place) - ("top" in place)) + rng.uniform(-JITTER, JITTER)
    raw = outline(kind)
    left, right = min(px for px, _ in raw), max(px for px, _ in raw)
    top, bottom = min(py for _, py in raw), max(py for _, py in raw)
    scale = size / max(right - left, bottom - top)
    points = tuple((x + (px - (left + right) / 2) * scale, y + (py - (top + bottom) / 2) * scale) for px, py in raw)
    level = rng.choice(BACKGROUNDS)
    shape = Shape(kind, colour, rng.choice(SHADES[colour][:2]), x, y, size, points)
    return Scene((shape,), (level, level, level), "plain", 0)


def write_data(folder: Path) -> None:
    """Pictures and `train.jsonl`, `validation.jsonl`: a caption in each language for every picture.

    A third of the pictures is captioned without its place; these lie in the middle.
    """
    judged = {prompt.text for language in LANGUAGES for prompt in judged_prompts(language, JUDGED)}
    for split, count in (("train", NUM_PICTURES), ("validation", NUM_VALIDATION)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        rng, rows = random.Random(f"{SEED}/{split}"), []
        for index in tqdm(range(count), desc=split, disable=None):
            kind, colour = rng.choice(tuple(KINDS)), rng.choice(tuple(COLOURS))
            place = rng.choice(tuple(PLACES)) if rng.random() < 2 / 3 else None
            name = f"{split}/{index:05d}.png"
            draw(make_paint_scene(kind, colour, place or frozenset(), rng), SIZE).save(folder / name)
            texts = [word_prompt(kind, colour, place, language, rng).text for language in LANGUAGES]
            # What stands around a prompt changes every word of it in the language model's eyes: colours are to be
            # known wherever they stand.
            rows += [
                {"image": name, "caption": rng.choice(BEFORE) + text + rng.choice(AFTER)}
                for text in texts
                if text not in judged
            ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, "utf-8")


def write_vae(folder: Path) -> None:
    """The VAE of the world's pictures of one shape, whatever its size, place and form."""
    pictures, indices = [], itertools.count()
    with tqdm(total=NUM_VAE_PICTURES, desc="pictures for the VAE", disable=None) as progress:
        while len(pictures) < NUM_VAE_PICTURES:
            scene = make_scene("train", next(indices), num_shapes=1, textures=VAE_TEXTURES)
            if scene.shapes[0].size >= MIN_VAE_SIZE:
                pictures.append(draw(scene, SIZE))
                progress.update()
    vae, log = train_vae(pictures, VAE_STEPS, SEED)
    vae.save_pretrained(folder)
    (folder / "log.json").write_text(json.dumps(log, indent=1) + "\n", "utf-8")


def write_start(folder: Path, vae: Path, language_model: Path) -> None:
    """The pipeline that training begins with."""
    chat = VisCPMChatForConditionalGeneration.from_pretrained(language_model, dtype=torch.float32)
    torch.manual_seed(SEED)
    text_config = {**chat.config.text_config.to_diff_dict(), "projection_dim": PROMPT_WIDTH}
    text_config.pop("model_type", None)
    encoder = VisCPMPaintTextEncoder(VisCPMPaintTextEncoderConfig(**text_config))
    encoder.model.load_state_dict(chat.model.language_model.state_dict())
    VisCPMPaintPipeline(
        vae=AutoencoderKL.from_pretrained(vae),
        text_encoder=encoder,
        tokenizer=CpmBeeTokenizer.from_pretrained(language_model),
        unet=UNet2DConditionModel(**UNET_CONFIG),
        scheduler=DDPMScheduler(**REFERENCE_SCHEDULER_CONFIG),
    ).save_pretrained(folder)


def evaluate(pipeline: VisCPMPaintPipeline, sheet: Path | None, count: int = JUDGED, batch_size: int = 40, **options):
    """Shares of right paintings per language, with the pipeline's default steps and guidance unless told otherwise."""
    pipeline.set_progress_bar_config(disable=True)
    results, images, captions = {}, [], []
    for language in LANGUAGES:
        prompts, verdicts = judged_prompts(language, count), []
        for begin in range(0, count, batch_size):
            batch = prompts[begin : begin + batch_size]
            generators = [torch.Generator().manual_seed(begin + index) for index in range(len(batch))]
            drawn = pipeline([prompt.text for prompt in batch], generator=generators, **options).images
            verdicts += [check_painting(prompt, image) for prompt, image in zip(batch, drawn, strict=True)]
            images += drawn
        captions += [verdict.is_right for verdict in verdicts]
        results[language] = {
            part: proportion(sum(getattr(verdict, f"is_{part}") for verdict in verdicts), count).as_dict()
            for part in ("right", "right_colour", "right_kind", "right_place")
        }
    if sheet is not None:
        grid = image_grid(images, ["" if is_right else "wrong" for is_right in captions])
        grid.quantize(256).save(sheet, optimize=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny/paint"), help="folder of the stages")
    parser.add_argument("--language-model", type=Path, default=Path("build/tiny/chat/text"), help="of chat.py")
    parser.add_argument("--output", type=Path, help="where the trained model goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work, seconds = arguments.work, {}

    def stage(name: str, is_done: Path, make) -> None:
        if not is_done.exists():
            begin = time.process_time()
            make()
            seconds[name] = round(time.process_time() - begin)

    data, vae, start, trained = (work / name for name in ("data", "vae", "start", "trained"))
    stage("data", data / "validation.jsonl", lambda: write_data(data))
    stage("vae", vae / "log.json", lambda: write_vae(vae))
    stage("start", start / "model_index.json", lambda: write_start(start, vae, arguments.language_model))
    config = PaintTrainingConfig(
        output=str(trained),
        model=str(start),
        data=[str(data / "train.jsonl")],
        eval_data=[str(data / "validation.jsonl")],
        seed=SEED,
        **TRAINING,
    )
    stage("trained", trained / "model_index.json", lambda: train_paint(config))
    if arguments.output is not None:
        save(trained, vae, arguments.output, seconds)


def save(trained: Path, vae: Path, output: Path, seconds: dict[str, int]) -> None:
    """The pipeline in fp16, without the code that other folders carry; its results beside the recipe."""
    pipeline = VisCPMPaintPipeline.from_pretrained(trained, dtype=torch.float16)
    DiffusionPipeline.save_pretrained(pipeline, output)
    strip_code(output)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    pipeline = VisCPMPaintPipeline.from_pretrained(output, dtype=torch.float32)
    report = {
        "seed": SEED,
        "torch": torch.__version__,
        "cpu_seconds": seconds,
        "right": evaluate(pipeline, results / "paint.png"),
        "vae": json.loads((vae / "log.json").read_text("utf-8")),
        "training": json.loads((trained / "training.json").read_text("utf-8"))["result"]["log"],
    }
    (results / "paint.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
