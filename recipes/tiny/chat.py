"""Trains `viscpm-tiny` Chat from nothing, in stages, and measures what VisCPM claims of them.

    python recipes/tiny/chat.py --work build/tiny/chat --output src/viscpm_hf/tiny_models/chat
    python recipes/tiny/chat.py --work build/tiny/chat --pivot

- `text`: the language model alone, on texts in both languages.
- `vision`: the vision tower alone, without any language.
- `both`: `text` and `vision` together, on questions about pictures in both languages. The vision tower is frozen.
- `polish`: the same, also late in conversations, while everything trains.
- `finish`: the same with more of what is still wrong; the tower is frozen again.
- `settle`: everything once more, at a low rate. This is the model that ships.

What VisCPM calls pivoting is measured beside that, with `--pivot`:

- `english`: `text` and `vision` together, on pictures with English questions. The language model is frozen.
- `chinese`: the same with a little Chinese.

A stage is a call of `viscpm_hf.training.train_chat` (`vision` has no language to chat in, and a loop of its own). A
finished stage is not done again, and one that was cut off is gone on with.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lessons import Lessons, picture_lesson, text_lesson
from packing import strip_code
from transformers import TrainerCallback
from vision import MAX_SHAPES, ROWS_OF_SHAPE, train_tower
from vocabulary import write_vocabulary

from viscpm_hf import (
    Beit3Model,
    CpmBeeTokenizer,
    VisCPMChat,
    VisCPMChatConfig,
    VisCPMChatForConditionalGeneration,
    VisCPMChatProcessor,
    VisCPMImageProcessor,
)
from viscpm_hf.batch.rows import row_key
from viscpm_hf.batch.runner import BatchRunner
from viscpm_hf.evaluation.shapes import CHAT_PARTS, ShapesChatRows, chat_rows, summarize
from viscpm_hf.modeling.modeling_cpm_bee import CpmBeeModel
from viscpm_hf.training import ChatTrainingConfig, train_chat


HIDDEN_SIZE = 128
IMAGE_SIZE, PATCH_SIZE, NUM_QUERIES = 64, 8, MAX_SHAPES * ROWS_OF_SHAPE
INITIALIZER_RANGE = 0.08
SEED = 2023


@dataclass(frozen=True)
class Stage:
    """A call of `train_chat`."""

    name: str
    after: str | None
    """The stage whose model it goes on with; `text` and `vision` are put together."""
    lesson: Callable
    steps: int
    learning_rate: float
    freeze_llm: bool = False
    freeze_vision: bool = False
    warmup: int = 50
    """Steps until the learning rate is reached."""
    lessons: int = 100_000
    """There are so many, one a step, shuffled."""


VISION_STEPS, VISION_BATCH_SIZE, VISION_LEARNING_RATE = 4000, 64, 4e-3

STAGES = (
    Stage("text", None, text_lesson, 5000, 4e-3, warmup=100),
    Stage("both", "text", functools.partial(picture_lesson, details=0.15), 5000, 3e-3, freeze_vision=True),
    Stage("polish", "both", functools.partial(picture_lesson, details=0.1, talked=0.4), 2000, 2e-3),
    Stage(
        "finish",
        "polish",
        functools.partial(
            picture_lesson, details=0.1, talked=0.3, hard={"position": 4, "follow_up": 2.5, "description": 2.5}
        ),
        2800,
        3e-3,
        freeze_vision=True,
    ),
    Stage(
        "settle",
        "finish",
        functools.partial(
            picture_lesson,
            details=0.05,
            talked=0.3,
            hard={"position": 3, "follow_up": 3, "description": 2.5, "colour": 2},
        ),
        1500,
        1.5e-3,
    ),
)

PIVOT = (
    STAGES[0],
    Stage(
        "english",
        "text",
        functools.partial(picture_lesson, languages=("en",), details=0.3),
        500,
        4e-3,
        freeze_llm=True,
    ),
    Stage("chinese", "english", functools.partial(picture_lesson, weights=(0.9, 0.1)), 80, 1e-3, freeze_llm=True),
)


def initialize_attention(language_model: CpmBeeModel) -> None:
    """A start with heads that look at the words before, at those after and around, and for equal words elsewhere.

    All layers share the one table of biases, and looking closely at a neighbour, or away from all of them, takes far
    larger values than such a short training would reach from nothing. Where queries and keys are projected alike,
    equal words look at each other (arXiv:2305.09828).
    """
    bias = language_model.position_bias
    table, after = bias.relative_attention_bias.weight, bias.num_buckets // 2
    with torch.no_grad():
        table.zero_()
        for distance in range(1, 5):
            table[distance, 0] = table[after + distance, 1] = 6.0 - 1.5 * distance
            table[distance, 2] = table[after + distance, 2] = 3.0 - 0.6 * distance
        table[: bias.num_buckets, 3] = -4.0  # the words of the same segment
        for layer in language_model.layers:
            last_head = slice(3 * layer.self_attn.head_dim, None)
            layer.self_attn.k_proj.weight[last_head] = layer.self_attn.q_proj.weight[last_head]


def make_model(work: Path) -> tuple[VisCPMChatForConditionalGeneration, VisCPMChatProcessor]:
    """The untrained model, of widths that 4-bit and 8-bit quantisation can take."""
    work.mkdir(parents=True, exist_ok=True)
    vocabulary = work / "vocab.txt"
    vocab_size = write_vocabulary(vocabulary)
    text_config = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": HIDDEN_SIZE // 4,
        "initializer_range": INITIALIZER_RANGE,
    }
    vision_config = {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "num_query_tokens": NUM_QUERIES,
        "max_query_positions": NUM_QUERIES + 2,
        "initializer_range": INITIALIZER_RANGE,
    }
    torch.manual_seed(SEED)
    model = VisCPMChatForConditionalGeneration(VisCPMChatConfig(text_config=text_config, vision_config=vision_config))
    initialize_attention(model.model.language_model)
    processor = VisCPMChatProcessor(
        VisCPMImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        CpmBeeTokenizer(str(vocabulary), model_max_length=512),
        num_query_tokens=NUM_QUERIES,
    )
    return model, processor


def train_vision(work: Path) -> dict:
    """Trains the vision tower alone, unless that is done; returns what it took."""
    log = work / "vision.json"
    if log.is_file():
        return json.loads(log.read_text("utf-8"))
    model, _ = make_model(work)
    torch.manual_seed(SEED)
    tower, begin = Beit3Model(model.config.vision_config), (time.perf_counter(), time.process_time())
    losses = train_tower(tower, VISION_STEPS, VISION_BATCH_SIZE, VISION_LEARNING_RATE, SEED)
    tower.save_pretrained(work / "vision")
    report = {
        "stage": "vision",
        "steps": VISION_STEPS,
        "loss": losses,
        "seconds": round(time.perf_counter() - begin[0]),
        "cpu_seconds": round(time.process_time() - begin[1]),
    }
    write_json(log, report)
    return report


def load_model(folder: Path) -> tuple[VisCPMChatForConditionalGeneration, VisCPMChatProcessor]:
    model = VisCPMChatForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model, VisCPMChatProcessor.from_pretrained(folder)


def encode_equal_pictures_once(tower: Beit3Model) -> None:
    """The samples of a lesson bring its picture each; neighbours that are equal are seen by the tower once."""

    def before(module, arguments):
        (pixel_values,) = arguments
        is_new = torch.ones(len(pixel_values), dtype=torch.bool)
        is_new[1:] = (pixel_values[1:] != pixel_values[:-1]).flatten(1).any(1)
        module.picture_of_row = is_new.cumsum(0) - 1
        return (pixel_values[is_new],)

    def after(module, arguments, output):
        output.last_hidden_state = output.last_hidden_state[module.picture_of_row]

    tower.register_forward_pre_hook(before)
    tower.register_forward_hook(after)


class Reporter(TrainerCallback):
    """Prints the loss as it is logged."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            print(f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.4f}", flush=True)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def train_stage(stage: Stage, work: Path) -> dict:
    """Trains a stage, unless that is done; returns what it took."""
    log = work / f"{stage.name}.json"
    if log.is_file():
        return json.loads(log.read_text("utf-8"))
    model, processor = make_model(work) if stage.after in (None, "text") else load_model(work / stage.after)
    if stage.after == "text":
        text, _ = load_model(work / "text")
        model.model.language_model.load_state_dict(text.model.language_model.state_dict())
        model.model.vision_tower.load_state_dict(Beit3Model.from_pretrained(work / "vision").state_dict())
    # bf16 products run on the CPU's matrix units where it has them; its fused attention has none for training.
    model.set_attn_implementation("eager")
    model.model.language_model.compile(dynamic=True)
    encode_equal_pictures_once(model.model.vision_tower)
    config = ChatTrainingConfig(
        output=str(work / stage.name),
        mode="full",
        freeze_llm=stage.freeze_llm,
        freeze_vision=stage.freeze_vision,
        train_patches=not stage.freeze_vision,
        learning_rate=stage.learning_rate,
        optimizer="muon",
        max_steps=stage.steps,
        batch_size=1,  # a lesson is a batch
        warmup=stage.warmup,
        precision="bf16",
        workers=1,  # on the other core, whenever that is free
        log_steps=50,
        save_steps=200,
        save_total_limit=1,
        resume=True,
        tensorboard=False,
        seed=SEED,
        bad_rows="fail",
    )
    lessons = Lessons(stage.lesson, stage.lessons, f"{SEED}/{stage.name}")
    begin = time.process_time()
    result = train_chat(config, train_dataset=lessons, model=model, processor=processor, callbacks=[Reporter()])
    if result.is_interrupted:
        raise SystemExit(f"interrupted in stage {stage.name}")
    report = {
        "stage": stage.name,
        "after": stage.after,
        "steps": result.steps,
        "loss": [{key: entry[key] for key in ("step", "loss")} for entry in result.log if "loss" in entry],
        "seconds": round(result.seconds),
        "cpu_seconds": round(time.process_time() - begin),
    }
    write_json(log, report)
    return report


def evaluate(folder: Path, count: int) -> dict:
    """Shares of right answers on `count` test pictures per language and type of question, greedily decoded."""
    results = folder / f"answers-{count}.json"
    if results.is_file():
        return json.loads(results.read_text("utf-8"))
    chat = VisCPMChat(str(folder), device="cpu", dtype=torch.float32)
    rows, lines = chat_rows(count), {}

    def keep(answered: Sequence[dict]) -> None:
        lines.update((row_key(line["id"], None), line) for line in answered)

    BatchRunner(ShapesChatRows(chat, mode="generate"), 64, keep).run(rows)
    summary = summarize(rows, lines, CHAT_PARTS)
    write_json(results, summary)
    return summary


def save(folder: Path, output: Path) -> None:
    """The model in fp16."""
    model, processor = load_model(folder)
    model.half().save_pretrained(output)
    processor.save_pretrained(output)
    strip_code(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny/chat"), help="folder of the stages")
    parser.add_argument("--output", type=Path, help="where the trained model goes, in fp16")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the logs")
    parser.add_argument("--count", type=int, default=500, help="test pictures per language and type of question")
    parser.add_argument("--pivot-count", type=int, default=200, help="the same for --pivot")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stage", choices=["vision", *(stage.name for stage in STAGES)], help="up to this one only")
    which.add_argument("--pivot", action="store_true", help="the stages that measure pivoting, instead of the others")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    reports = [] if arguments.stage == "text" else [train_vision(arguments.work)]
    if arguments.stage == "vision":
        return
    for stage in PIVOT if arguments.pivot else STAGES:
        reports.append(train_stage(stage, arguments.work))
        if stage.name == arguments.stage:
            return
        if stage is STAGES[-1]:
            reports[-1]["answers"] = evaluate(arguments.work / stage.name, arguments.count)
        elif stage in PIVOT[1:]:
            reports[-1]["answers"] = evaluate(arguments.work / stage.name, arguments.pivot_count)
    if arguments.output is not None and not arguments.pivot:
        save(arguments.work / STAGES[-1].name, arguments.output)
    results = arguments.results / ("pivot.json" if arguments.pivot else "chat.json")
    write_json(results, {"seed": SEED, "torch": torch.__version__, "stages": reports})


if __name__ == "__main__":
    main()
