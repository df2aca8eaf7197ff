"""The judge's files, prompts and replies."""

import json

import pytest

from viscpm_hf.evaluation.questions import read_questions
from viscpm_hf.evaluation.rules import (
    Comparison,
    Rule,
    Rules,
    make_comparisons,
    parse_scores,
    read_answers,
    read_contexts,
)


@pytest.mark.parametrize(
    ("review", "scores"),
    [
        ("8 9", (8, 9)),
        ("8 9\nBoth are good; Assistant 1 has 3 faults.", (8, 9)),
        ("\n\n8.5, 9\nBecause ...", (8.5, 9)),
        ("8,9", (8, 9)),
        ("(7, 10)", (7, 10)),
        ("8/10 9/10", (8, 9)),
        ("**8 9**", (8, 9)),
        ("```\n8 9\n```", (8, 9)),
        ("Scores: 8 9", (8, 9)),
        ("Assistant 1: 8, Assistant 2: 9", (8, 9)),
        ("Assistant 1: 8/10\nAssistant 2: 9/10\nThe first ...", (8, 9)),
        ("Assistant 1: 1\nAssistant 2: 2\n", (1, 2)),
        ("8分 9分", (8, 9)),
        ("８ ９\n助手1的回答……", (8, 9)),
        ("助手1：8分，助手2：9.5分", (8, 9.5)),
        ("助手1得8分，助手2得9分。", (8, 9)),
        ("AI助理 1：7（满分10分）\nAI助理 2：6（满分10分）", (7, 6)),
        ("回答一：3\n回答二：4", (3, 4)),
        ("第一个：3，第二个：4", (3, 4)),
        ("评分：8、9", (8, 9)),
        ("0 10", (0, 10)),
    ],
)
def test_scores(review, scores):
    assert parse_scores(review) == scores


@pytest.mark.parametrize(
    "review",
    ["", "I can't judge this.", "8", "8 9 7", "80 90", "8-9", "85% 90%", "Assistant 1 is better.", "8 11", "GPT4 v2"],
)
def test_no_scores(review):
    assert parse_scores(review) is None


def test_prompt():
    rule = Rule("Rate them.", "Assistant", "Be fair.")
    system, user = Comparison({"text": "What?"}, "A cat.", "A grey cat.", "A dog.", rule).messages()
    assert system == {"role": "system", "content": "Be fair."}
    assert user["content"] == (
        "[Context]\nA cat.\n\n[Question]\nWhat?\n\n[Assistant 1]\nA grey cat.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nA dog.\n\n[End of Assistant 2]\n\n[System]\nRate them.\n\n"
    )
    assert len(Comparison({"text": "?"}, "", "", "", Rule("", "")).messages()) == 1


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def test_rules_for_one_language_or_both(tmp_path):
    rule = {"role": "Assistant", "prompt": "en"}
    both = write(tmp_path / "a.json", {"en": {"conv": rule}, "zh": {"conv": {"role": "助手", "prompt": "zh"}}})
    assert Rules(both).rule("zh", "conv") == Rule("zh", "助手")
    flat = write(tmp_path / "b.json", {"conv": rule, "system": "Be fair."})
    assert Rules(flat).rule("zh", "conv") == Rules(flat).rule("en", "conv") == Rule("en", "Assistant", "Be fair.")
    with pytest.raises(ValueError, match="b.json has no rule .* for 'detail' in 'en'"):
        Rules(flat).rule("en", "detail")
    for text, message in (("[1]", "JSON list"), ("{", "no JSON")):
        with pytest.raises(ValueError, match=message):
            Rules(write(tmp_path / "c.json", text))


def test_contexts(tmp_path):
    path = write(
        tmp_path / "context.jsonl",
        {
            "image": "a.jpg",
            "captions": ["One.", "Two."],
            "instances": [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 1]}],
        },
        {"image": "b.jpg", "caption": "猫"},
    )
    assert read_contexts(path) == {"a.jpg": "One.\nTwo.\n\ncat: [0.1, 0.2, 0.3, 1]", "b.jpg": "猫"}
    path = write(tmp_path / "bad.jsonl", {"image": "a.jpg"}, {"image": "b.jpg", "captions": [1]}, {"captions": ["a"]})
    with pytest.raises(ValueError, match='bad.jsonl, line 1: there is no caption; line 2: not as .*; line 3: "image"'):
        read_contexts(path)


QUESTION = {"question_id": 1, "image": "a.png", "text": "What?", "category": "conv"}


def test_questions(tmp_path):
    path = write(tmp_path / "q.jsonl", QUESTION, "", {**QUESTION, "question_id": 2, "text": "是什么？"})
    first, second = read_questions(path)
    assert (first.id, first.values["language"], second.id, second.values["language"]) == (1, "en", 2, "zh")
    assert second.line == 3


def test_questions_of_other_files(tmp_path):
    """OwlEval's lines, and the JSON lists that VisualCLA has of LLaVA's and OwlEval's questions and of its answers."""
    owl = {"image": "1.jpg", "question_id": 1, "question": "What is funny?"}
    (row,) = read_questions(write(tmp_path / "owl.jsonl", owl))
    assert row.values == {"image": "1.jpg", "text": "What is funny?", "category": "other", "language": "en"}
    lists = [{**owl, "question": "有趣吗？", "type": "reasoning"}]
    lists.append({"id": "7", "image": "7.jpg", "instruction": "描述图像。", "type": "detail", "question_id": 2})
    path = write(tmp_path / "zh.json", json.dumps(lists, indent=2, ensure_ascii=False))
    assert [(row.id, row.values["text"], row.values["category"]) for row in read_questions(path)] == [
        (1, "有趣吗？", "reasoning"),
        (2, "描述图像。", "detail"),
    ]
    answers = read_answers(write(tmp_path / "a.json", json.dumps([{**lists[1], "output": "一只猫。"}])))
    assert answers['"2"']["text"] == "一只猫。"
    with pytest.raises(ValueError, match='entry 2: "question" is a text, got None; entry 3: is a JSON int'):
        bad = [lists[0], {**owl, "question_id": 3, "question": None}, 3]
        read_questions(write(tmp_path / "bad.json", json.dumps(bad)))
    with pytest.raises(ValueError, match="is no JSON list"):
        read_questions(write(tmp_path / "cut.json", "[{"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is no JSON|line 2: .*JSON"),
        ("[1]", "line 2: is a JSON list"),
        ({**QUESTION, "question_id": None}, 'line 2: "question_id"'),
        ({**QUESTION, "question_id": 1}, "line 2: question_id 1 is that of line 1 too"),
        ({**QUESTION, "question_id": 2, "text": " "}, 'line 2: "text" is a text'),
        ({**QUESTION, "question_id": 2, "category": 3}, 'line 2: "category" is a text'),
        ({**QUESTION, "question_id": 2, "image": 3}, 'line 2: "image" is a text'),
        ({**QUESTION, "question_id": 2, "language": "fr"}, "line 2: .*en, zh, got 'fr'"),
    ],
)
def test_bad_questions_are_named_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "q.jsonl", QUESTION, line)
    with pytest.raises(ValueError, match=f"q.jsonl, {message}"):
        read_questions(path)


def test_missing_images_are_named(tmp_path):
    path = write(tmp_path / "q.jsonl", QUESTION)
    with pytest.raises(ValueError, match="line 1: there is no image .*a.png"):
        read_questions(path, tmp_path)
    with pytest.raises(OSError, match="no folder"):
        read_questions(path, tmp_path / "none")
    with pytest.raises(ValueError, match="holds no row"):
        read_questions(write(tmp_path / "empty.jsonl", ""))


def test_comparisons_name_what_is_missing(tmp_path):
    questions = read_questions(write(tmp_path / "q.jsonl", QUESTION, {**QUESTION, "question_id": 2, "image": "b.png"}))
    answers = read_answers(write(tmp_path / "a.jsonl", {"question_id": 1, "text": "A."}))
    references = read_answers(write(tmp_path / "r.jsonl", *({"question_id": name, "text": ""} for name in (1, 2))))
    rules = Rules(write(tmp_path / "rules.json", {"conv": {"role": "A", "prompt": "Rate."}}))
    paths = {"questions": "q.jsonl", "references": "r.jsonl", "answers": "a.jsonl", "contexts": "c.jsonl"}
    with pytest.raises(
        ValueError, match="q.jsonl, line 2: question 2 has no line in a.jsonl; line 2: the image b.png"
    ):
        make_comparisons(questions, {"a.png": "A."}, references, answers, rules, paths)


def test_failed_answers_are_not_judged(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question_id": 1, "text": ""}, {"question_id": 2, "error": "no picture"})
    with pytest.raises(ValueError, match="line 2: the question wasn't answered"):
        read_answers(path)
