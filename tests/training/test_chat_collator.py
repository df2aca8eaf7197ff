"""Samples to batches: what the reference trained on, and what costs nothing to leave out."""

import numpy as np
import PIL.Image
import pytest
import torch
from chat_training_support import COLOURS, conversation
from PIL import ImageChops

from viscpm_hf.training.augmentation import augment
from viscpm_hf.training.chat_dataset import Draws, SampleLimits
from viscpm_hf.training.collator import ChatCollator
from viscpm_hf.training.paint_data import load_square
from viscpm_hf.training.records import BadRowError, ChatRecord


LIMITS = SampleLimits(max_length=512, min_image_side=2)


def golden_records(golden) -> list[ChatRecord]:
    return [
        ChatRecord([(case["question"], case["answer"])], [golden.image(case["image"])])
        for case in golden.expected["train"]
    ]


def collate(processor, items, **options):
    draws = Draws(items, seed=0, do_augment=options.pop("do_augment", False))
    return ChatCollator(processor, options.pop("limits", LIMITS), **options)([draws[i] for i in range(len(items))])


def test_labels_are_the_references(golden, processor):
    batch = collate(processor, golden_records(golden))
    targets, lengths = golden.tensors["train.target"].long(), golden.tensors["train.length"].tolist()
    for row, length in enumerate(lengths):
        # The reference's target of a token is the next one: our label, one place on; ours has one token more, `</s>`.
        expected = [target for target in targets[row, :length].tolist() if target != -100]
        assert [label for label in batch["labels"][row].tolist() if label != -100] == expected
        assert batch["attention_mask"][row].sum() == length + 1


def test_loss_and_gradients_are_the_references(golden, own_chat):
    """Left out logits and padding on the other side change nothing."""
    model = own_chat.model
    batch = collate(own_chat.processor, golden_records(golden))
    assert batch["logits_to_keep"] < batch["input_ids"].shape[1] // 2
    outputs = model(**batch)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, golden.tensors["train.loss"], atol=0, rtol=1e-4)
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    model.zero_grad()
    escape = own_chat.processor.tokenizer.escape
    documents = [
        {"image": "<image>", "context": "", "question": escape(question), "<ans>": escape(answer)}
        for ((question, answer),) in (record.turns for record in golden_records(golden))
    ]
    images = [record.images[0] for record in golden_records(golden)]
    inputs = own_chat.processor(images, documents, return_labels=True, padding_side="right", return_tensors="pt")
    model(**inputs).loss.backward()  # what test_parity.py compares with the reference's gradients
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (ours[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-9, name


def test_a_row_for_every_turn(golden, processor):
    items = [
        conversation(str(golden.image(0)), ("q", "a"), ("q2", "a2")),
        conversation(None, ("text alone", "a")),
        conversation([str(golden.image(0)), str(golden.image(1))], ("two", "a")),
    ]
    batch = collate(processor, items)
    assert batch["input_ids"].shape[0] == 4
    assert batch["pixel_values"].shape[0] == 1 + 1 + 0 + 2
    placeholders = (batch["input_ids"] == processor.image_token_id).sum(1) // processor.num_query_tokens
    assert placeholders.tolist() == [1, 1, 0, 2]


def test_a_blank_picture_that_teaches_nothing(own_chat):
    items = [conversation(None, ("q", "red")), conversation(None, ("which?", "a long answer"))]
    plain, filled = (collate(own_chat.processor, items, needs_image=needs) for needs in (False, True))
    assert "pixel_values" not in plain
    assert filled["pixel_values"].shape[0] == 1 and filled["input_ids"].shape[0] == 3
    model = own_chat.model
    torch.testing.assert_close(model(**filled).loss, model(**plain).loss, atol=1e-6, rtol=1e-6)
    model(**filled).loss.backward()
    tower = [parameter.grad for parameter in model.model.vision_tower.parameters() if parameter.grad is not None]
    assert tower and all(not gradient.any() for gradient in tower)


def test_bad_samples_leave_the_batch(golden, processor, tmp_path, caplog):
    (tmp_path / "broken.png").write_bytes(golden.image(0).read_bytes()[:200])
    items = [
        conversation(str(tmp_path / "broken.png"), ("q", "a")),
        conversation(str(golden.image(0)), ("q", "a")),
        conversation(None, ("q", "z" * 600)),
    ]
    batch = collate(processor, items)
    assert batch["input_ids"].shape[0] == 1
    assert "item 0" in caplog.text and "truncated" in caplog.text
    assert "item 2" in caplog.text and "more than max_length 512" in caplog.text
    with pytest.raises(BadRowError, match="item 0: .*truncated"):
        collate(processor, items, limits=SampleLimits(512, 2, "fail"))
    nothing = collate(processor, [items[0], items[2]])
    assert (nothing["labels"] == -100).all()


# ------------------------------------------------------------------------------------------------------ augmentation


@pytest.fixture
def photograph(golden) -> PIL.Image.Image:
    return PIL.Image.open(golden.image(0)).convert("RGB").resize((96, 64))


def test_augmentation_is_seeded(photograph):
    def difference(first, second):
        return first.size != second.size or ImageChops.difference(first, second).getbbox() is not None

    before = photograph.copy()
    changed = [augment(photograph, f"0/{index}") for index in range(200)]
    assert not difference(photograph, before)
    assert not difference(augment(photograph, "0/7"), changed[7])
    assert sum(difference(changed[0], other) for other in changed[1:]) > 190
    for picture in changed:
        share = picture.width * picture.height / (96 * 64)
        assert 0.45 < share <= 1.0 and picture.mode == "RGB"


def test_a_picture_too_narrow_to_crop():
    assert augment(PIL.Image.new("RGB", (400, 2)), "0").size == (400, 2)


def test_augmentation_follows_the_draw(golden, processor):
    items = [conversation(str(golden.image(index)), ("q", COLOURS[index])) for index in range(3)]
    plain, first, again = (collate(processor, items, do_augment=flag) for flag in (False, True, True))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"], plain["pixel_values"])
    draws = Draws(items, seed=0, do_augment=True)
    later = ChatCollator(processor, LIMITS)([draws[3 + index] for index in range(3)])
    assert not torch.equal(first["pixel_values"], later["pixel_values"])
    alone = ChatCollator(processor, LIMITS)([draws[1]])  # whatever stands beside it
    assert torch.equal(alone["pixel_values"][0], first["pixel_values"][1])


def test_photographs_are_learned_upright_and_at_their_contrast(processor, tmp_path):
    """As they are asked about, by path, bytes and in memory; also by Paint, which takes squares of them."""
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    shown = PIL.Image.fromarray(grey).transpose(PIL.Image.Transpose.ROTATE_270)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "lying.png"
    PIL.Image.fromarray(grey.astype(np.uint16) * 257).save(path, exif=exif)
    expected = collate(processor, [ChatRecord([("q", "a")], [shown])])
    for image in (path, path.read_bytes(), PIL.Image.open(path)):
        for augmented in (False, True):
            found = collate(processor, [ChatRecord([("q", "a")], [image])], do_augment=augmented)
            wanted = collate(processor, [ChatRecord([("q", "a")], [shown])], do_augment=augmented)
            assert torch.equal(found["pixel_values"], wanted["pixel_values"])
        assert load_square(image, 16).tobytes() == load_square(shown, 16).tobytes()
    assert not torch.equal(wanted["pixel_values"], expected["pixel_values"])
