"""Rows of every format as records, and records as samples."""

from pathlib import Path

import PIL.Image
import pytest
from chat_training_support import conversation

from viscpm_hf.training.encoding import DocumentEncoding
from viscpm_hf.training.records import CAPTION_INSTRUCTIONS, BadRowError, ChatRecord, read_record


TURNS = [("<image>\nWhat colour?", "Red."), ("And <image>?", "Blue.")]


def as_messages(turns, parts=None):
    messages = []
    for question, answer in turns:
        content = question if parts is None else [*parts, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        parts = parts and []
    return messages


def test_every_answered_turn_is_a_sample():
    row = conversation("a.png", ("<image>\nq1 <b>", "a1 < 2"), ("q2", "a2"))
    row["conversations"].append({"from": "human", "value": "unanswered"})
    record = read_record(row)
    assert [(sample.question, sample.answer) for sample in record.samples] == [("q1 <b>", "a1 < 2"), ("q2", "a2")]
    assert [sample.turns_before for sample in record.samples] == [(), (("q1 <b>", "a1 < 2"),)]


def test_a_sample_is_the_prompt_of_its_question(golden, chat):
    """So that a second turn is learned in the form in which it will be asked."""
    image, questions = golden.image(0), ("图片 < 是什么？", "and <b> then?")
    first = chat.ask(image, questions[0], max_new_tokens=4)
    record = ChatRecord([(questions[0], first.answer), (questions[1], "x")], [image])
    contexts = ["", first.context]
    for sample, context in zip(record.samples, contexts, strict=True):
        prompt = chat.processor.encode_turn(sample.question, context, [(0, 0)]).input_ids
        assert DocumentEncoding(chat.processor).encode(sample).input_ids[: len(prompt)] == prompt


def test_text_without_an_image():
    for row in (conversation(None, ("q", "a")), conversation("", ("q", "a"))):
        assert read_record(row).images == ()


def test_several_images():
    assert len(read_record(conversation(["a.png", "b.png"], ("q", "a"))).images) == 2


def test_pictures_in_memory_and_in_tables():
    picture = PIL.Image.new("RGB", (8, 8))
    for image, expected in ((picture, picture), (b"x", b"x"), ({"bytes": b"x", "path": "y.png"}, b"x")):
        assert read_record(conversation(image, ("q", "a"))).images == (expected,)


@pytest.mark.parametrize(
    "row",
    [
        {"images": ["a.png", "b.png"], **conversation(None, *TURNS)},
        {"images": ["a.png", "b.png"], "image": None, "messages": as_messages(TURNS)},
        {"images": [{"path": "a.png", "bytes": None}, {"path": "b.png"}], "messages": as_messages(TURNS)},
        {"images": ["a.png", "b.png"], "prompt": as_messages(TURNS)[:3], "completion": as_messages(TURNS)[3:]},
    ],
    ids=["LLaMA-Factory", "ms-swift", "of tables", "TRL"],
)
def test_layouts_of_other_trainers(row):
    record = read_record(row)
    assert list(record.images) == [Path("a.png"), Path("b.png")]
    assert list(record.turns) == [("What colour?", "Red."), ("And ?", "Blue.")]


@pytest.mark.parametrize("images", ["a.png", ["a.png"], PIL.Image.new("RGB", (2, 2)), b"x", {"bytes": b"x"}])
def test_images_is_read_as_image(images):
    turns = conversation(None, ("q", "a"))["conversations"]
    for key in ("image", "images"):
        assert len(read_record({key: images, "conversations": turns}).images) == 1
        assert len(read_record({key: images, "caption": "a cat"}).images) == 1


def test_parts_of_messages():
    text = [("q", "a")]
    inside = as_messages(text, [{"type": "image", "image": b"x"}])
    assert read_record({"messages": inside}).images == (b"x",)
    beside = as_messages(text, [{"type": "image"}, {"type": "image"}])
    record = read_record({"images": ["a.png", "b.png"], "messages": beside})
    assert len(record.images) == 2 and record.turns[0] == ("q", "a")
    record = read_record({"prompt": "q", "completion": "a"})
    assert list(record.turns) == [("q", "a")]


@pytest.mark.parametrize(("caption", "language"), [("一只猫", "zh"), ("a cat", "en")])
def test_captions_get_an_instruction_of_their_language(caption, language):
    questions = {read_record({"image": "a.png", "caption": caption}, seed=seed).turns[0] for seed in range(40)}
    assert {answer for _, answer in questions} == {caption}
    assert {question for question, _ in questions} == set(CAPTION_INSTRUCTIONS[language])
    again = [read_record({"image": "a.png", "caption": caption}, seed=3).turns for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "object with fields"),
        ({"image": "a.png"}, "neither 'conversations' nor 'caption'"),
        ({"conversations": "hello"}, "list of turns"),
        ({"conversations": []}, "nothing to learn"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "no turn has an answer"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "message 1 is an answer without a question"),
        ({"conversations": [{"from": "human", "value": "q"}] * 2}, "message 2 is a question, but the one before"),
        ({"conversations": [{"from": "bot", "value": "q"}]}, "from 'bot'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "message 1 is a question of type int"),
        ({"conversations": [{"value": "q"}]}, "no object with 'from' and 'value'"),
        (conversation(None, ("q", " "), ("q", "a")), "turn 1 has no answer, but others follow"),
        (conversation(7, ("q", "a")), "'image' is a path or a picture, not int"),
        ({"caption": "a cat"}, "caption without an image"),
        (conversation(None, ("<image>\nq", "a")), "1 <image> marks in its questions, but 0 pictures"),
        (conversation("", ("<image>\nq", "a")), "1 <image> marks in its questions, but 0 pictures"),
        (conversation("a.png", ("<image>\nq", "a"), ("<image>q", "a")), "2 <image> marks .* but 1 pictures"),
        ({"images": ["a.png", "b.png"], **conversation(None, ("<image>\nq", "a"))}, "1 <image> marks .*but 2 pict"),
        ({"images": [], **conversation(None, ("<image>\nq", "a"))}, "but 0 pictures"),
        ({"messages": as_messages([("q", "a")], [{"type": "image"}])}, "1 <image> marks .* but 0 pictures"),
        ({"messages": as_messages([("q", "a")], [{"type": "video"}])}, "part that is neither text nor a picture"),
        ({"messages": as_messages([("q", "a")], [{"type": "image", "url": "http://x/y.png"}])}, "is not fetched"),
        ({"messages": [{"role": "system", "content": "s"}]}, "from 'system'"),
        ({"images": ["a.png"], **conversation("b.png", ("q", "a"))}, "'image' and 'images' both name pictures"),
        ({"videos": ["a.mp4"], **conversation(None, ("q", "a"))}, "'videos': the model takes pictures and text"),
        ({"messages": [], **conversation(None, ("q", "a"))}, "'conversations' and 'messages' are both"),
        ({"prompt": "q"}, "neither 'conversations' nor 'caption'"),
        ({"prompt": "q", "completion": ["a"]}, "two texts, or two lists"),
        ({"image": "a.png", "caption": 3}, "'caption' is text"),
    ],
)
def test_bad_rows_say_where_and_why(row, message):
    with pytest.raises(BadRowError, match=r"data.json line 7: .*" + message):
        read_record(row, source="data.json line 7")


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.png", "a/../../secret.png"])
def test_images_stay_inside_their_folder(path, tmp_path):
    with pytest.raises(BadRowError, match="outside the images folder"):
        read_record(conversation(path, ("q", "a")), images_folder=tmp_path, is_confined=True)


def test_urls_are_no_images(processor):
    """Nobody's data makes a training machine call somewhere."""
    (sample,) = read_record(conversation("http://127.0.0.1:9/x.png", ("q", "a"))).samples
    with pytest.raises(ValueError, match="no image file"):
        processor.image_processor.fetch_images(sample.images[0])
