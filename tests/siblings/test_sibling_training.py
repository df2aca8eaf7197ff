"""`viscpm-hf train chat` on the siblings: what is learned, by what, and what comes out."""

import json
import random
from pathlib import Path

import pytest
import torch
from chat_training_support import conversation, write_rows
from PIL import Image
from sibling_folders import NAMES
from transformers import AutoModelForImageTextToText, AutoProcessor

from viscpm_hf import SiblingChat
from viscpm_hf.cli import main
from viscpm_hf.training.adapters import merge_adapter
from viscpm_hf.training.chat_dataset import ChatDataset, Draw, SampleLimits, sample_length
from viscpm_hf.training.collator import ChatCollator
from viscpm_hf.training.data_files import DataPart
from viscpm_hf.training.records import read_record


LIMITS = SampleLimits(max_length=2048, min_image_side=2)
TURNS = (("<image>\n图片里有什么？", "a <x> circle"), ("what colour?", "红色 <image>"))


@pytest.fixture
def pictures(tmp_path) -> Path:
    for name, size in (("wide", (150, 40)), ("small", (40, 40))):
        Image.frombytes("RGB", size, random.Random(name).randbytes(3 * size[0] * size[1])).save(
            tmp_path / f"{name}.png"
        )
    return tmp_path


def collated(folder: Path, pictures: Path, *rows) -> tuple:
    processor = AutoProcessor.from_pretrained(folder)
    records = [read_record(row, images_folder=pictures) for row in rows]
    draws = [Draw(record.samples, "0") for record in records]
    return processor, records, ChatCollator(processor, LIMITS)(draws)


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_the_answers_alone(whole_folders, pictures, name):
    """The prompt is what inference has, and what is learned is the answer and its end."""
    rows = conversation("wide.png", *TURNS), conversation(None, TURNS[1])
    processor, records, batch = collated(whole_folders[name], pictures, *rows)
    samples = [sample for record in records for sample in record.samples]
    assert len(batch["input_ids"]) == len(samples) == 3
    width = batch["logits_to_keep"]
    assert batch["labels"].shape[1] == width
    end = processor.tokenizer.eos_token_id
    picture = Image.open(pictures / "wide.png")
    for index, sample in enumerate(samples):
        ids, labels = batch["input_ids"][index], batch["labels"][index]
        learned = labels[labels != -100].tolist()
        assert learned[-1] == end and processor.answer_text(learned[:-1]).replace("< ", "<") == sample.answer
        assert ids[-len(learned) :].tolist() == learned and (labels[: -len(learned)] == -100).all()
        messages = []
        for question, answer in (*sample.turns_before, (sample.question, None)):
            messages.append({"role": "user", "content": question})
            messages += [{"role": "assistant", "content": answer}] if answer else []
        images = []
        if sample.images:
            messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": messages[0]["content"]}]
            images = [picture]
        inference = processor(images or None, processor.apply_chat_template(messages, add_generation_prompt=True))
        ids = ids[batch["attention_mask"][index].bool()].tolist()
        assert ids[: -len(learned)] == inference["input_ids"][0]
        assert sample_length(processor, sample) == len(ids)
    views = batch["num_views"].tolist()
    assert views[2] == 0 and sum(views) == len(batch["pixel_values"]) and views[0] == views[1]
    assert views[0] > 1 if name == "minicpmv-2.0" else views[0] == 1


@pytest.mark.parametrize("name", NAMES)
def test_batch_loss_is_that_of_the_rows_alone(whole_folders, pictures, name):
    rows = [conversation("wide.png", TURNS[0]), conversation("small.png", TURNS[1]), conversation(None, TURNS[1])]
    processor, records, batch = collated(whole_folders[name], pictures, *rows)
    model = AutoModelForImageTextToText.from_pretrained(whole_folders[name]).eval()
    collator = ChatCollator(processor, LIMITS)
    with torch.no_grad():
        alone = [model(**collator([Draw(record.samples, "0")])).loss for record in records]
        counts = [(row != -100).sum() for row in batch["labels"]]
        expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
        torch.testing.assert_close(model(**batch).loss, expected, atol=1e-5, rtol=1e-5)


def test_a_batch_without_a_picture_gets_a_blank_one(whole_folders, pictures):
    processor = AutoProcessor.from_pretrained(whole_folders["minicpmv-2.0"])
    record = read_record(conversation(None, TURNS[1]))
    batch = ChatCollator(processor, LIMITS, needs_image=True)([Draw(record.samples, "0")])
    assert batch["num_views"].tolist() == [0, 1] and (batch["labels"][1] == -100).all()


@pytest.mark.parametrize("name", NAMES)
def test_pictures_in_tables_are_measured(whole_folders, pictures, name):
    """As those in files: how long a sample is depends on its picture's size."""
    import datasets

    names = ("wide", "small")
    rows = [{"image": {"bytes": (pictures / f"{n}.png").read_bytes(), "path": None}, "caption": "红色"} for n in names]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(pictures / "rows.parquet")
    data = write_rows(pictures / "rows.json", [{"image": f"{n}.png", "caption": "红色"} for n in names])
    processor = AutoProcessor.from_pretrained(whole_folders[name])
    table, files = (
        ChatDataset([DataPart.open(path)], processor, LIMITS) for path in (str(pictures / "rows.parquet"), data)
    )
    assert table.skipped.total == 0 and list(table.lengths) == list(files.lengths)


def train(model: Path, pictures: Path, output: Path, *options: str) -> dict:
    data = write_rows(pictures / "rows.json", [conversation(f"{n}.png", *TURNS) for n in ("wide", "small")])
    arguments = ["--model", str(model), "--data", data, "--output", str(output), "--no-tensorboard"]
    arguments += ["--min-image-side", "2", "--log-steps", "1", "--batch-size", "2", *options]
    assert main(["train", "chat", *arguments]) == 0
    return json.loads((output / "training.json").read_text("utf-8"))["result"]


def test_adapter_learns_answers_and_merges(whole_folders, pictures, tmp_path):
    folder = whole_folders["minicpmv-2.0"]
    before = SiblingChat(folder, device="cpu")
    options = ("--max-steps", "12", "--learning-rate", "0.02", "--lora-rank", "4", "--max-length", "400")
    result = train(folder, pictures, tmp_path / "adapter", *options)
    losses = [entry["loss"] for entry in result["log"] if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    trained = SiblingChat(tmp_path / "adapter", device="cpu")
    layers = {name.split(".lora_")[0] for name, _ in trained.model.named_parameters() if ".lora_" in name}
    assert layers and all(name.startswith("language_model.") for name in layers)
    question = {"image": pictures / "wide.png", "question": TURNS[0][0], "mode": "generate", "max_new_tokens": 8}
    assert trained.ask(**question).answer != before.ask(**question).answer
    merge = ["--model", str(folder), "--adapter", str(tmp_path / "adapter"), str(tmp_path / "whole")]
    assert main(["train", "merge", *merge]) == 0
    whole = SiblingChat(tmp_path / "whole", device="cpu")
    assert whole.ask(**question).answer == trained.ask(**question).answer
    half = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    before.processor.save_pretrained(tmp_path / "half")
    merge_adapter(tmp_path / "half", tmp_path / "adapter", tmp_path / "half-merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "half-merged", dtype="auto")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float16}


def test_full_fine_tuning_freezes_what_it_is_told(whole_folders, pictures, tmp_path):
    folder = whole_folders["visualcla"]
    options = ("--mode", "full", "--max-steps", "2", "--warmup", "0", "--learning-rate", "0.001", "--freeze-vision")
    train(folder, pictures, tmp_path / "out", *options)
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in (folder, tmp_path / "out"))
    changed = {
        name.partition(".")[0]
        for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed == {"resampler", "language_model"}


def test_options_of_viscpm_are_refused(whole_folders, pictures, tmp_path, capsys):
    data = write_rows(pictures / "rows.json", [conversation("small.png", TURNS[0])])
    arguments = ["--model", str(whole_folders["omnilmm"]), "--data", data, "--output", str(tmp_path / "out")]
    assert main(["train", "chat", *arguments, "--image-size", "448"]) == 1
    assert "image_size" in capsys.readouterr().err
