"""Runs over rows: which rows there are, what becomes of results, batches that fail."""

import json

import pytest
import torch
from support import Golden

from viscpm_hf.batch.launching import Share
from viscpm_hf.batch.processing import ChatRows, image_name
from viscpm_hf.batch.results import Results
from viscpm_hf.batch.rows import check_rows, read_rows
from viscpm_hf.batch.runner import WINDOW_BATCHES, BatchRunner, in_batches


GOLDEN_A = Golden("chat_a")
LENGTH = 5


def write_lines(path, *lines) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def small_chat():
    return GOLDEN_A.load_chat()


def chat_rows(chat, **options) -> ChatRows:
    return ChatRows(chat, GOLDEN_A.folder, generation={"max_new_tokens": LENGTH}, **options)


def questions(count: int) -> list[dict]:
    return [{"id": i, "image": f"image_{i % 3}.png", "question": "颜色" * (i * 5 % 7)} for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------- rows


def test_rows_are_told_by_their_ids(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", '\ufeff{"id": 1}', "", '{"id": "b", "x": "中"}', "  ", "{oops", '["id"]')
    rows = list(read_rows(path))
    assert [(row.index, row.line, row.id) for row in rows] == [(0, 1, 1), (1, 3, "b"), (2, 5, None), (3, 6, None)]
    assert rows[1].values["x"] == "中"
    assert "Line 5 is no JSON" in rows[2].error and "Line 6 is a JSON list" in rows[3].error
    assert len({row.key for row in rows}) == 4
    assert check_rows(path) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": 1}', '{"x": 1}', '{"id": ""}'], 'line 2 has no "id"; line 3 has no "id". Every row needs'),
        (['{"id": "a"}', "", '{"id": "a"}'], 'line 3 has the id "a" of line 1'),
        (['{"id": 7}', '{"id": "7"}'], "of line 1"),
        (['{"id": true}', '{"id": [1]}', '{"id": 1.5}'], "line 1 has an .* line 2 has an .* line 3 has an"),
        (['{"x": 1}'] * 8, "and 3 more"),
        (["[", '{"id": 1}', "]"], "one JSON list"),
        (["[]"], "one JSON list"),
        ([" "], "holds no row"),
    ],
)
def test_ids_that_can_not_be_told_apart(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        check_rows(write_lines(tmp_path / "in.jsonl", *lines))


def test_file_names_of_ids():
    ids = [1, "a", "A", "a-b_c", "a/b", "a_b", "../x", "中", "文", "é" * 500, "x" * 500, "x" * 501, "a.png", "", " "]
    names = [image_name(identifier) for identifier in ids]
    assert names[:2] == ["1.png", "a.png"]
    assert len({name.lower() for name in names}) == len(ids)
    assert all("/" not in name and len(name.encode()) < 200 and name.count(".") == 1 for name in names)


# ------------------------------------------------------------------------------------------------------------- results


def test_results_are_joined_in_the_inputs_order(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", *({"id": i} for i in range(6)), "bad")
    results = Results(tmp_path / "out.jsonl")
    with results.writer(0) as first, results.writer(1) as second:
        second.write([{"id": 5, "answer": "five"}, {"id": None, "line": 7, "error": "no JSON"}])
        first.write([{"id": 3, "error": "x"}, {"id": 1, "answer": "中"}, {"id": 0, "answer": ""}])
    with results.writer(2) as third:
        third.write([{"id": 3, "answer": "better"}, {"id": 1, "error": "worse"}, {"id": 4, "error": "y"}])
    with pytest.raises(ValueError, match="lacks the row of line 3"):
        results.join(read_rows(source))
    assert not results.output.exists() and len(list(results.parts.iterdir())) == 3
    with results.writer(0) as first:
        first.write([{"id": 2, "answer": "two"}])
    joined = results.join(read_rows(source))
    assert (joined.rows, joined.errors) == (7, 2)
    written = [json.loads(line) for line in results.output.read_text("utf-8").splitlines()]
    assert [row["id"] for row in written] == [0, 1, 2, 3, 4, 5, None]
    assert [row.get("answer") for row in written] == ["", "中", "two", "better", None, "five", None]
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


@pytest.mark.parametrize("tail", [b'{"id": 2, "answ', b'{"id": 2, "answer": "x"}', b"\xff\xfe", b""])
def test_a_half_written_line_is_dropped(tmp_path, tail):
    results = Results(tmp_path / "out.jsonl")
    with results.writer(0) as part:
        part.write([{"id": 1, "answer": "x" * 100_000}])
    with open(results.part(0), "ab") as file:
        file.write(tail)
    assert list(results.finished()) == ['"1"']
    with results.writer(0) as part:
        part.write([{"id": 2, "answer": "whole"}])
    assert list(results.finished()) == ['"1"', '"2"']


def test_other_files_are_not_touched(tmp_path):
    results = Results(tmp_path / "out.jsonl")
    write_lines(results.output, {"id": 1, "question": "an input"})
    with pytest.raises(ValueError, match="Line 1 of .* is no result"):
        results.finished()
    write_lines(results.output, {"id": 1, "answer": ""}, {"id": 9, "answer": ""})
    with pytest.raises(ValueError, match='1 results whose ids the input doesn\'t have .the first is "9"'):
        results.join(read_rows(write_lines(tmp_path / "in.jsonl", {"id": 1})))
    assert len(results.output.read_text().splitlines()) == 2
    results.check_settings({"mode": "reference", "seed": None})
    results.check_settings({"mode": "reference", "seed": None})
    with pytest.raises(ValueError, match="mode was 'reference' and is 'generate'"):
        results.check_settings({"mode": "generate", "seed": None})
    results.discard()
    assert not results.output.exists() and not results.settings.exists()


def test_a_finished_output_keeps_its_settings(tmp_path):
    source, results = write_lines(tmp_path / "in.jsonl", {"id": 1}), Results(tmp_path / "out.jsonl")
    results.check_settings({"model": "a"})
    with results.writer(0) as part:
        part.write([{"id": 1, "answer": "x"}])
    results.join(read_rows(source))
    assert results.output.exists() and not results.parts.exists()
    with pytest.raises(ValueError, match="begun with other settings: model was 'a' and is 'b'"):
        results.check_settings({"model": "b"})
    results.discard()
    results.check_settings({"model": "b"})


def test_of_errors_the_last_one_counts(tmp_path):
    """It knows what the attempts before it have used."""
    source, results = write_lines(tmp_path / "in.jsonl", {"id": 1}), Results(tmp_path / "out.jsonl")
    for error in ("first", "second"):
        with results.writer(0) as part:
            part.write([{"id": 1, "error": error}])
    results.join(read_rows(source))
    assert json.loads(results.output.read_text("utf-8"))["error"] == "second"
    with results.writer(0) as part:
        part.write([{"id": 1, "error": "third"}])
    results.join(read_rows(source))
    assert json.loads(results.output.read_text("utf-8"))["error"] == "third"


def test_processes_share_the_rows(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", *({"id": i} for i in range(25)))
    shares = [[row.id for row in Share(rank, 3).rows(read_rows(source), 4)] for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(25))
    assert min(map(len, shares)) >= 8


# ------------------------------------------------------------------------------------------------------------- batches


def run_all(processor, path, batch_size: int) -> tuple[dict, BatchRunner]:
    written: list[dict] = []
    runner = BatchRunner(processor, batch_size, written.extend)
    counts: list[int] = []
    runner.run(read_rows(path), counts.append)
    assert sum(counts) == len(written)
    return {row["id"]: row for row in written}, runner


def test_any_batch_size_gives_the_same(small_chat, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", *questions(13))
    alone, _ = run_all(chat_rows(small_chat), path, 1)
    assert len(alone) == 13
    for index, row in enumerate(questions(13)):
        turn = small_chat.ask(GOLDEN_A.folder / row["image"], row["question"], max_new_tokens=LENGTH)
        assert alone[index]["answer"] == turn.answer
        assert alone[index]["context"] == turn.context
    for batch_size in (3, 50):
        assert run_all(chat_rows(small_chat), path, batch_size)[0] == alone
    # Every row draws on its own, so that a run that was cut off and went on draws the same.
    options = {"mode": "generate", "seed": 3}
    sampled = chat_rows(small_chat, **options)
    sampled.generation |= {"do_sample": True, "temperature": 3.0}
    together, _ = run_all(sampled, path, 4)
    assert together == run_all(sampled, path, 5)[0]
    assert [together[index]["seed"] for index in range(13)] == list(range(3, 16))


def test_batches_hold_rows_of_similar_length(small_chat, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", *questions(2 * 2 * WINDOW_BATCHES + 1))
    batches = list(in_batches(read_rows(path), chat_rows(small_chat), 2, on_failure=None))
    for window in (batches[:WINDOW_BATCHES], batches[WINDOW_BATCHES : 2 * WINDOW_BATCHES]):
        lengths = [row.length for batch in window for row in batch]
        assert lengths == sorted(lengths, reverse=True) and len(lengths) == 2 * WINDOW_BATCHES


def test_rows_are_read_as_they_are_needed(small_chat, tmp_path):
    """A hundred thousand rows are not held at once."""
    path = write_lines(tmp_path / "in.jsonl", *questions(1000))
    taken = 0

    def counted():
        nonlocal taken
        for row in read_rows(path):
            taken += 1
            yield row

    next(in_batches(counted(), chat_rows(small_chat), 2, on_failure=None))
    assert taken == 2 * WINDOW_BATCHES


@pytest.fixture
def limited_chat():
    """A model that runs out of memory with more than two rows, as the allocator says it."""
    chat = GOLDEN_A.load_chat()

    def check(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    chat.model.language_model().register_forward_pre_hook(check, with_kwargs=True)
    return chat


def test_out_of_memory_halves_the_batch(small_chat, limited_chat, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", *questions(11))
    found, runner = run_all(chat_rows(limited_chat), path, 7)
    assert found == run_all(chat_rows(small_chat), path, 7)[0]
    assert runner.batch_size == 1


def test_one_row_that_breaks_the_model(small_chat, tmp_path):
    """Whatever the model makes of a row, the others of its batch get their answers."""
    processor = chat_rows(GOLDEN_A.load_chat())

    def check(module, args, kwargs):
        if kwargs.get("attention_mask") is not None and (kwargs["attention_mask"].sum(-1) > 60).any():
            raise RuntimeError("no kernel\nfor this")

    processor.chat.model.language_model().register_forward_pre_hook(check, with_kwargs=True)
    rows = questions(5)
    rows[2]["question"] = "颜色" * 40
    path = write_lines(tmp_path / "in.jsonl", *rows)
    found, _ = run_all(processor, path, 4)
    assert found[2] == {"id": 2, "error": "no kernel for this"}
    expected, _ = run_all(chat_rows(small_chat), path, 4)
    assert {**found, 2: None} == {**expected, 2: None}


def test_a_lost_device_ends_the_run(tmp_path):
    processor = chat_rows(GOLDEN_A.load_chat())

    def lose(module, args):
        raise RuntimeError("CUDA error: device-side assert triggered")

    processor.chat.model.model.vision_tower.register_forward_pre_hook(lose)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run_all(processor, write_lines(tmp_path / "in.jsonl", *questions(3)), 2)


# ----------------------------------------------------------------------------------------------------------- bad rows


def test_conversations(small_chat, tmp_path):
    """LLaVA's records: the last human turn is asked, what was said before is its context."""
    turns = [("human", "<image>\n颜色?"), ("gpt", "a < b"), ("human", "月"), ("gpt", "what a data set expects")]
    records = [{"from": name, "value": text} for name, text in turns]
    rows = [
        {"id": "whole", "image": "image_0.png", "conversations": records},
        {"id": "open", "image": "image_0.png", "conversations": records[:3]},
        {"id": "first", "image": "image_0.png", "conversations": records[:1]},
        {"id": "plain", "image": "image_0.png", "question": "月", "context": "User: 颜色?\nAI: a << b\n"},
    ]
    found, _ = run_all(chat_rows(small_chat), write_lines(tmp_path / "in.jsonl", *rows), 4)
    assert found["whole"]["answer"] == found["open"]["answer"] == found["plain"]["answer"]
    assert found["plain"]["context"] == found["whole"]["context"]
    assert found["first"]["question"] == "颜色?"


def test_images_and_messages(small_chat, tmp_path):
    """Rows as LLaMA-Factory, ms-swift and TRL have them."""
    part = {"type": "image", "path": "image_0.png"}
    rows = [
        {"id": "right", "image": "image_0.png", "question": "颜色?"},
        {"id": "list", "images": ["image_0.png"], "question": "颜色?"},
        {"id": "path", "images": "image_0.png", "image": None, "question": "<image>\n颜色?"},
        {"id": "messages", "images": ["image_0.png"], "messages": [{"role": "user", "content": "<image>颜色?"}]},
        {"id": "parts", "messages": [{"role": "user", "content": [part, {"type": "text", "text": "颜色?"}]}]},
    ]
    rows.append({**rows[3], "id": "answered"})
    rows[-1]["messages"] = [*rows[3]["messages"], {"role": "assistant", "content": "what a data set expects"}]
    found, _ = run_all(chat_rows(small_chat), write_lines(tmp_path / "in.jsonl", *rows), 3)
    right = {key: value for key, value in found["right"].items() if key != "id"}
    for row in rows:
        assert {key: value for key, value in found[row["id"]].items() if key != "id"} == right, row


BAD_ROWS = {
    "no question": ({}, 'The row has no "question"'),
    "question": ({"question": ["月"]}, '"question" is a text, got list'),
    "context": ({"question": "月", "context": 3}, '"context" is a text, got int'),
    "syntax": ({"question": "月", "context": "a < b"}, "opens a special token"),
    "too long": ({"question": "a" * 4000}, "more than the limit of 3,000"),
    "image": ({"question": "月", "image": ["a.png"]}, "the path of one picture"),
    "no image": ({"question": "月", "image": "nowhere.png"}, "There is no image file"),
    "a URL": ({"question": "月", "image": "http://127.0.0.1/a.png"}, "There is no image file"),
    "a NUL": ({"question": "月", "image": "a\0.png"}, "NUL"),
    "folder": ({"question": "月", "image": "."}, "There is no image file"),
    "no picture": ({"question": "月", "image": "vocab.txt"}, "is not an image file"),
    "seed": ({"question": "月", "seed": "7"}, '"seed" is a whole number'),
    "negative": ({"question": "月", "seed": -1}, '"seed" is a whole number'),
    "conversations": ({"conversations": "月"}, '"conversations" is a list of turns'),
    "empty": ({"conversations": []}, '"conversations" is a list of turns'),
    "order": ({"conversations": [{"from": "gpt", "value": "x"}]}, "Turn 0 of"),
    "mark": ({"question": "<image>\n月"}, "1 <image> marks in its questions, but 0 pictures"),
    "marked turn": (
        {"image": None, "conversations": [{"from": "human", "value": "<image>月"}]},
        "1 <image> marks in its questions, but 0 pictures",
    ),
    "two marks": ({"image": "image_0.png", "question": "<image><image>"}, "2 <image> marks"),
    "two images": ({"images": ["image_0.png"] * 2, "question": "月"}, "the path of one picture"),
    "both": ({"images": ["a.png"], "image": "b.png", "question": "月"}, "both name pictures"),
    "empty image": ({"image": "", "question": "月"}, "the path of one picture"),
    "turn": ({"conversations": [{"from": "human", "value": None}]}, "Turn 0 of"),
}


def test_bad_rows_leave_the_others(small_chat, tmp_path):
    good = questions(4)
    rows = [*good[:2], *({"id": name, **values} for name, (values, _) in BAD_ROWS.items()), "{", "7", *good[2:]]
    path = write_lines(tmp_path / "in.jsonl", *rows)
    found, _ = run_all(chat_rows(small_chat), path, 8)
    for name, (_, message) in BAD_ROWS.items():
        assert message in found[name]["error"], name
        assert set(found[name]) == {"id", "error"}
    assert found[None]["error"].startswith("Line 27 is a JSON int")
    expected, _ = run_all(chat_rows(small_chat), write_lines(tmp_path / "good.jsonl", *good), 8)
    assert {key: found[key] for key in expected} == expected
