"""TRL's trainers on conversations with pictures and on text: they train on the answers' tokens and nothing else."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


trl = pytest.importorskip("trl", reason="trl is not installed")

# Of different lengths, so that a batch has padding; "🦄" has no token of its own.
TALKS = [
    ("What colour is the shape?", "Red."),
    ("有几个图形？", "三个。"),
    ("Is there a 🦄 in the picture?", "No."),
]
ARGUMENTS = {"report_to": "none", "use_cpu": True, "max_length": None, "per_device_train_batch_size": 3}


def message(role: str, text: str) -> dict:
    return {"role": role, "content": text}


@pytest.fixture(scope="module")
def processor(chat_folder):
    return AutoProcessor.from_pretrained(chat_folder)


@pytest.fixture
def model(chat_folder):
    return AutoModelForImageTextToText.from_pretrained(chat_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def images(pictures) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in pictures[:3]]


@pytest.fixture(scope="module")
def expected(chat_folder, processor, images) -> float:
    """The mean loss over all answers' tokens, each conversation encoded by itself."""
    model = AutoModelForImageTextToText.from_pretrained(chat_folder, dtype=torch.float32)
    losses = []
    for (question, answer), image in zip(TALKS, images, strict=True):
        parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        whole = [message("user", parts), message("assistant", [{"type": "text", "text": answer}])]
        encoded = processor.apply_chat_template(
            whole, tokenize=True, return_dict=True, return_tensors="pt", return_labels=True
        )
        count = int((encoded["labels"] != -100).sum())
        with torch.no_grad():
            losses.append((model(**encoded).loss.item() * count, count))
    return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


def rows(kind: str, images: list[Image.Image]) -> list[dict]:
    if kind == "messages":
        return [
            {"images": [image], "messages": [message("user", question), message("assistant", answer)]}
            for (question, answer), image in zip(TALKS, images, strict=True)
        ]
    return [
        {"images": [image], "prompt": [message("user", question)], "completion": [message("assistant", answer)]}
        for (question, answer), image in zip(TALKS, images, strict=True)
    ]


@pytest.mark.parametrize("kind", ["messages", "prompt and completion"])
def test_sft_with_pictures(kind, model, processor, images, expected, tmp_path):
    from datasets import Dataset

    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            logging_steps=1,
            learning_rate=1e-3,
            assistant_only_loss=kind == "messages",
            **ARGUMENTS,
        ),  # fmt: skip
        train_dataset=Dataset.from_list(rows(kind, images)),
        processing_class=processor,
    )
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert loss == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_sft_of_text(bee_folder, tmp_path):
    from datasets import Dataset

    model = AutoModelForCausalLM.from_pretrained(bee_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(bee_folder)
    data = [{"prompt": question, "completion": f" {answer}"} for question, answer in TALKS[:2]]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), max_steps=3, logging_steps=1, learning_rate=1e-2, **ARGUMENTS),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_dpo_with_pictures(model, processor, images, tmp_path):
    """Log-probabilities are those of the answers, each encoded by itself."""
    from datasets import Dataset

    chosen, rejected = "Red.", "There are two."
    data = [
        {
            "images": [image],
            "prompt": [message("user", question)],
            "chosen": [message("assistant", chosen)],
            "rejected": [message("assistant", rejected)],
        }
        for (question, _), image in zip(TALKS, images, strict=True)
    ]
    sums = {chosen: [], rejected: []}
    for (question, _), image in zip(TALKS, images, strict=True):
        for answer in sums:
            parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            whole = [message("user", parts), message("assistant", [{"type": "text", "text": answer}])]
            encoded = processor.apply_chat_template(
                whole, tokenize=True, return_dict=True, return_tensors="pt", return_labels=True
            )
            with torch.no_grad():
                loss = model.eval()(**encoded).loss.item()
            sums[answer].append(-loss * int((encoded["labels"] != -100).sum()))
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(tmp_path), max_steps=1, logging_steps=1, learning_rate=1e-3, **ARGUMENTS),
        train_dataset=Dataset.from_list(data),
        processing_class=processor,
    )
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    for name, answer in (("logps/chosen", chosen), ("logps/rejected", rejected)):
        # TRL multiplies with the head's weight itself, so columns of slots without a token count too: 0.3 % here.
        assert log[name] == pytest.approx(sum(sums[answer]) / 3, rel=5e-3, abs=2e-2), json.dumps(log, default=str)
