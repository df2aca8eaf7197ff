"""The demo world's test sets. The golden models know nothing of it; a model that knows all is told by its answers."""

import json
from types import SimpleNamespace

import pytest
from paint_support import PAINT
from support import Golden

from viscpm_hf.batch.runner import PreparedRow
from viscpm_hf.chat.chat import ChatTurn
from viscpm_hf.cli.main import main
from viscpm_hf.evaluation import shapes
from viscpm_hf.shapes import LANGUAGES, QUESTION_TYPES, draw, judged_prompts, make_scene


CHAT = str(Golden("chat_a").weights)
SHORT = ("--device", "cpu", "--batch-size", "8")


def test_questions_of_every_type_and_language():
    rows = shapes.chat_rows(3)
    assert len({row.key for row in rows}) == len(rows) == 3 * len(QUESTION_TYPES) * len(LANGUAGES)
    assert [row.index for row in rows] == list(range(len(rows)))
    for type in QUESTION_TYPES:
        for language in LANGUAGES:
            found = [row for row in rows if (row.values["type"], row.values["language"]) == (type, language)]
            assert len({row.values["picture"] for row in found}) == 3
    assert rows == shapes.chat_rows(3)


def test_right_answers_are_right_and_counted():
    """The checks see what the model said, by type and language."""
    rows = shapes.chat_rows(2)
    questions = [shapes._question(row.values["type"], row.values["language"], row.values["picture"]) for row in rows]
    prepared = [PreparedRow(row, (None, question), 1) for row, question in zip(rows, questions, strict=True)]

    def results(say):
        turns = [ChatTurn(question.text, say(question), "", None, 1, 1.0) for question in questions]
        chat = SimpleNamespace(ask_batch=lambda *arguments, **options: turns)
        found = shapes.ShapesChatRows(chat).process(prepared)
        return {row.key: line for row, line in zip(rows, found, strict=True)}

    right = shapes.summarize(rows, results(lambda question: question.answer), shapes.CHAT_PARTS)
    for language in LANGUAGES:
        assert set(right[language]) == {*QUESTION_TYPES, "all"}
        assert right[language]["count"]["right"]["value"] == right[language]["all"]["right"]["value"] == 1
        assert right[language]["all"]["right"]["count"] == 2 * len(QUESTION_TYPES)
    foreign = shapes.summarize(
        rows, results(lambda question: question.answer if question.language == "en" else "yes"), shapes.CHAT_PARTS
    )
    assert foreign["en"]["all"]["right_language"]["value"] == 1
    assert foreign["zh"]["all"]["right_language"]["value"] == foreign["zh"]["all"]["right"]["value"] == 0


def test_a_failed_row_is_a_wrong_one():
    rows = shapes.chat_rows(1)
    lines = {row.key: {"right": True} for row in rows} | {rows[0].key: {"id": rows[0].id, "error": "no"}}
    figures = shapes.summarize(rows, lines, ("right",))[rows[0].values["language"]][rows[0].values["type"]]
    assert (figures["right"]["value"], figures["right"]["count"]) == (0, 1)


def test_paintings_are_checked(tmp_path):
    from viscpm_hf.shapes import make_shape
    from viscpm_hf.tiny.scene import Scene, scene_rng

    (row,) = [row for row in shapes.paint_rows(1) if row.values["language"] == "en"]
    prompt = judged_prompts("en", 1)[0]
    assert row.values["prompt"] == prompt.text
    shape = make_shape(prompt.kind, prompt.colour, 0.5, 0.5, 0.5, scene_rng("test", 0))
    for name, shapes_drawn in (("right.png", (shape,)), ("empty.png", ())):
        draw(Scene(shapes_drawn, (255, 255, 255), "plain", 0), 64).save(tmp_path / name)
    checker = shapes.ShapesPaintRows(painter=None, output=tmp_path)
    assert checker._checked(row, "right.png")["right"] is True
    assert checker._checked(row, "empty.png")["right"] is False


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main(["eval", "shapes", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_chat_command(capsys, tmp_path):
    output = tmp_path / "shapes.jsonl"
    command = ("chat", CHAT, "--output", output, "--count", "1", "--max-new-tokens", "3", *SHORT)
    status, out, err = run(capsys, *command)
    assert (status, err) == (0, "")
    assert "en colour" in out and "zh all" in out
    results = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [result["id"] for result in results] == [row.id for row in shapes.chat_rows(1)]
    chat = Golden("chat_a").load_chat()
    colour = results[0]
    expected = chat.ask(draw(make_scene("test", colour["picture"])), colour["question"], max_new_tokens=3)
    assert colour["answer"] == expected.answer
    report = json.loads((tmp_path / "shapes.report.json").read_text("utf-8"))
    assert report["evaluation"] == "shapes chat" and report["counts"] == {"rows": 14, "errors": 0}
    assert report["results"]["zh"]["all"]["right"]["count"] == 7
    status, _, err = run(capsys, *command, "--seed", "2")
    assert status == 1 and "--overwrite" in err


def test_paint_command(capsys, tmp_path):
    command = ("paint", PAINT / "pytorch_model.bin", "--output", tmp_path / "p.jsonl", "--images", tmp_path / "images")
    status, out, err = run(capsys, *command, "--count", "2", "--steps", "2", *SHORT)
    assert (status, err) == (0, "")
    assert "en all" in out and "zh all" in out
    assert len(list((tmp_path / "images").glob("*.png"))) == 4
    report = json.loads((tmp_path / "p.report.json").read_text("utf-8"))
    assert set(report["results"]["en"]["all"]) == set(shapes.PAINT_PARTS)


def test_places_that_cannot_be_written(capsys, tmp_path):
    status, _, err = run(capsys, "chat", CHAT, "--output", tmp_path / "none" / "a.jsonl", *SHORT)
    assert status == 1 and "no folder" in err
    with pytest.raises(SystemExit):
        run(capsys, "chat", CHAT, "--output", tmp_path / "a.jsonl", "--count", "0")
