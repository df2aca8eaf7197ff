"""`viscpm-hf eval` from end to end: files, standard streams, exit status, and runs that end early."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from judge_server import JudgeServer, Reply, failure
from support import GOLDEN, Golden

from viscpm_hf.chat import answering
from viscpm_hf.cli import main


GOLDEN_A = Golden("chat_a")
MODEL = str(GOLDEN_A.weights)
SHORT = ("--max-new-tokens", "4", "--device", "cpu", "--batch-size", "2")


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# --------------------------------------------------------------------------------------------------------- llava-bench

QUESTIONS = [
    {"question_id": 7, "image": "image_0.png", "text": "图片是什么颜色？", "category": "conv"},
    {"question_id": 3, "image": "image_1.png", "text": "what shape is this?", "category": "detail"},
    {"question_id": 5, "image": "image_0.png", "text": "描述", "category": "complex"},
    {"question_id": 4, "image": "image_2.png", "text": "颜色", "category": "conv"},
]


@pytest.fixture
def bench(tmp_path):
    return [MODEL, "--questions", write(tmp_path / "q.jsonl", *QUESTIONS), "--images", GOLDEN_A.folder, "--answers"]


def test_answers_are_those_of_chat(capsys, tmp_path, bench):
    answers = tmp_path / "answers.jsonl"
    status, out, err = run(capsys, "llava-bench", *bench, answers, *SHORT)
    assert (status, err) == (0, "")
    chat = GOLDEN_A.load_chat()
    for question, answer in zip(QUESTIONS, lines(answers), strict=True):
        expected = chat.ask(GOLDEN_A.folder / question["image"], question["text"], max_new_tokens=4)
        assert answer["question_id"] == question["question_id"]
        assert answer["prompt"] == question["text"]
        assert answer["text"] == expected.answer
        assert answer["model_id"] == "pytorch_model.bin"
        assert answer["category"] == question["category"]
    assert [answer["language"] for answer in lines(answers)] == ["zh", "en", "zh", "zh"]
    report = json.loads((tmp_path / "answers.report.json").read_text("utf-8"))
    assert report["evaluation"] == "llava-bench"
    assert report["model"]["name"] == MODEL and len(report["model"]["fingerprint"]) == 64
    assert report["settings"]["mode"] == "reference" and report["settings"]["max_new_tokens"] == 4
    assert report["seeds"] == {"first_row": 0, "bootstrap": 0}
    assert report["counts"] == {"rows": 4, "errors": 0}
    assert report["results"]["zh"]["conv"]["answers"] == 2
    interval = report["results"]["zh"]["all"]["in_language"]
    assert interval["low"] <= interval["value"] <= interval["high"] and interval["count"] == 3
    assert {"viscpm_hf", "python", "torch", "transformers"} <= set(report["versions"])
    assert "zh conv" in out and not (tmp_path / "answers.jsonl.parts").exists()


def test_an_interrupted_run_goes_on(capsys, tmp_path, bench, monkeypatch):
    """What is finished is neither lost nor done again, and the answers are those of an uninterrupted run."""
    whole, answers = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    sampling = ("--mode", "generate", "--temperature", "2", "--seed", "5")
    assert run(capsys, "llava-bench", *bench, whole, *SHORT, *sampling)[0] == 0
    answered = []
    stock = answering.answer_batch

    def interrupted(chat, requests, **options):
        if answered:
            signal.raise_signal(signal.SIGINT)
        answered.extend(requests)
        return stock(chat, requests, **options)

    monkeypatch.setattr("viscpm_hf.chat.chat.answer_batch", interrupted)
    status, _, err = run(capsys, "llava-bench", *bench, answers, *SHORT, *sampling)
    assert status == 130
    assert "2 of 4 rows are finished" in err
    assert not answers.exists()

    monkeypatch.setattr("viscpm_hf.chat.chat.answer_batch", stock)
    status, _, err = run(capsys, "llava-bench", *bench, answers, *SHORT, "--seed", "6")
    assert status == 1
    assert "begun with other settings" in err
    assert run(capsys, "llava-bench", *bench, answers, *SHORT, *sampling)[0] == 0
    assert lines(answers) == lines(whole)


def test_finished_answers_need_no_model_and_belong_to_their_settings(capsys, tmp_path, bench, monkeypatch):
    answers = tmp_path / "answers.jsonl"
    assert run(capsys, "llava-bench", *bench, answers, *SHORT)[0] == 0
    before = answers.read_bytes()
    monkeypatch.setattr("viscpm_hf.cli.eval_bench.load_chat", None)
    assert run(capsys, "llava-bench", *bench, answers, *SHORT)[0] == 0
    assert answers.read_bytes() == before
    shutil.copytree(GOLDEN_A.folder, tmp_path / "elsewhere")
    others = [
        (bench, ("--num-beams", "1"), "num_beams was None and is 1"),
        ([str(Golden("chat_b").weights), *bench[1:]], (), "model was "),
        (bench, ("--images", tmp_path / "elsewhere"), "images was "),
        (bench, ("--vision-config", GOLDEN_A.folder / "expected.json"), "vision_config was None and is "),
    ]
    for command, options, message in others:
        report = ("--report", tmp_path / "other.json")  # without the one of the finished run to compare with
        status, _, err = run(capsys, "llava-bench", *command, answers, *SHORT, *report, *options)
        assert status == 1
        assert message in err and "--overwrite" in err
        assert answers.read_bytes() == before and not report[1].exists()


def test_a_bad_picture_costs_one_answer_and_is_tried_again(capsys, tmp_path):
    for index in range(3):
        shutil.copy(GOLDEN_A.image(index), tmp_path)
    (tmp_path / "image_1.png").write_bytes(b"no picture")
    questions, answers = write(tmp_path / "q.jsonl", *QUESTIONS), tmp_path / "answers.jsonl"
    command = ("llava-bench", MODEL, "--questions", questions, "--images", tmp_path, "--answers", answers, *SHORT)
    status, out, err = run(capsys, *command)
    assert status == 1
    assert "4 rows, 1 error;" in out and "tries again" in err
    assert ["error" in answer for answer in lines(answers)] == [False, True, False, False]
    shutil.copy(GOLDEN_A.image(1), tmp_path)
    assert run(capsys, *command)[0] == 0
    assert [answer["question_id"] for answer in lines(answers)] == [7, 3, 5, 4]
    assert not any("error" in answer for answer in lines(answers))


def test_bad_questions(capsys, tmp_path):
    questions = write(tmp_path / "q.jsonl", QUESTIONS[0], {**QUESTIONS[1], "category": 1}, QUESTIONS[0])
    command = ("llava-bench", MODEL, "--questions", questions, "--images", GOLDEN, "--answers", tmp_path / "a.jsonl")
    status, out, err = run(capsys, *command)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert f"{questions}, line 2: " in err and "line 3: question_id 7 is that of line 1 too" in err
    assert not (tmp_path / "a.jsonl.parts").exists()


# --------------------------------------------------------------------------------------------------------------- judge

RULES = {
    "en": {name: {"role": "Assistant", "prompt": "Rate them."} for name in ("conv", "detail", "complex")},
    "zh": {name: {"role": "助手", "prompt": "请打分。"} for name in ("conv", "detail", "complex")},
}
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Six questions, two of each category, and everything that judging needs but the endpoint."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ids = range(6)
    questions = [
        {"question_id": i, "image": f"{i % 2}.jpg", "text": ("What?", "什么？")[i % 2], "category": name}
        for i, name in zip(ids, ("conv", "conv", "detail", "detail", "complex", "complex"), strict=True)
    ]
    contexts = [{"image": f"{i}.jpg", "captions": [f"Picture {i}."]} for i in range(2)]
    files = {
        "questions": write(tmp_path / "q.jsonl", *questions),
        "context": write(tmp_path / "c.jsonl", *contexts),
        "rules": write(tmp_path / "rules.json", RULES),
        "reference": write(tmp_path / "r.jsonl", *({"question_id": i, "text": f"reference {i}"} for i in ids)),
        "answers": write(
            tmp_path / "a.jsonl", *({"question_id": i, "text": f"answer {i}", "model_id": "viscpm"} for i in ids)
        ),
    }
    options = [part for name, path in files.items() for part in (f"--{name}", path)]
    return [*options, "--judgements", tmp_path / "j.jsonl", "--judge-model", "stub", "--parallel", "1"]


def judge(capsys, server, arguments, *more):
    return run(capsys, "judge", *arguments, "--base-url", server.base_url, *more)


def number_of(request) -> int:
    return int(request.prompt.split("answer ")[1].split("\n")[0])


def test_judgements(capsys, tmp_path, judged):
    with JudgeServer(lambda request, number: Reply(f"{number_of(request) + 4} 5\nWhy.")) as server:
        status, out, err = judge(capsys, server, judged, "--judge-seed", "3")
    assert (status, err) == (0, "")
    assert "6 of 6 judged, 0 errors; 6 requests, 660 tokens" in out
    found = lines(tmp_path / "j.jsonl")
    assert [judgement["question_id"] for judgement in found] == list(range(6))
    assert [judgement["tuple"] for judgement in found] == [[i + 4, 5] for i in range(6)]
    assert [judgement["language"] for judgement in found] == ["en", "zh"] * 3
    assert {judgement["model_id"] for judgement in found} == {"viscpm"}
    assert found[0]["content"] == "4 5\nWhy."
    for request in server.requests:
        assert request.path == "/v1/chat/completions"
        assert request.headers["authorization"] == f"Bearer {KEY}"
        body = {name: request.body[name] for name in ("model", "temperature", "max_tokens", "seed")}
        assert body == {"model": "stub", "temperature": 0.2, "max_tokens": 1024, "seed": 3}
        number = number_of(request)
        assert f"Picture {number % 2}." in request.prompt and f"reference {number}" in request.prompt
        assert ("[助手 1]" in request.prompt) == (number % 2 == 1)
    report = json.loads((tmp_path / "j.report.json").read_text("utf-8"))
    assert report["settings"]["model"] == "stub" and report["seeds"] == {"judge": 3}
    assert report["counts"] == {"rows": 6, "judged": 6, "errors": 0}
    assert not any(KEY in path.read_text("utf-8") for path in tmp_path.iterdir() if path.is_file())


def test_requests_run_side_by_side(capsys, judged):
    with JudgeServer(lambda request, number: Reply(seconds=0.2)) as server:
        assert judge(capsys, server, judged, "--parallel", "3")[0] == 0
    assert server.most_at_once == 3


def test_failures_on_the_way_are_tried_again(capsys, judged):
    replies = [
        failure(429, retry_after="1.2"),
        failure(500),
        failure(503, retry_after_ms="5"),
        Reply(body=b'{"id": "chatcmpl-1", "choi'),
        Reply(body=b"<html>Bad gateway</html>", headers={"Content-Type": "text/html"}),
        Reply(body=b"{}"),
    ]
    with JudgeServer(lambda request, number: replies[number] if number < len(replies) else Reply()) as server:
        status, out, _ = judge(capsys, server, judged, "--attempts", "4")
    assert status == 0
    assert "6 of 6 judged, 0 errors; 12 requests" in out
    first, second = server.requests[:2]
    assert 1.2 <= second.time - first.time < 5
    assert {number_of(request) for request in server.requests[:7]} == {0}


def test_a_review_without_scores_is_asked_for_again_and_then_an_error(capsys, tmp_path, judged):
    def reply(request, number):
        return Reply("I can't say.") if number_of(request) == 2 and number < 6 else Reply()

    with JudgeServer(reply) as server:
        status, out, err = judge(capsys, server, judged)
        assert status == 1
        assert "5 of 6 judged, 1 error; 8 requests" in out and "tries again" in err
        failed = lines(tmp_path / "j.jsonl")[2]
        assert "no two scores" in failed["error"] and failed["usage"]["requests"] == 3
        # The next run asks for that one alone; what it has cost adds up.
        status, out, _ = judge(capsys, server, judged)
    assert status == 0
    assert "6 of 6 judged, 0 errors; 9 requests, 990 tokens" in out
    assert len(server.requests) == 9


@pytest.mark.parametrize(
    ("limit", "requests", "reason"),
    [
        (("--max-requests", "4"), 4, "4 requests"),
        # A request may take 1,400 tokens or so before it has been sent; 110 is what the judge then counts.
        (("--max-tokens", "1700"), None, "1,700 tokens"),
        (("--max-cost", "0.0112", "--prompt-price", "1", "--completion-price", "10"), None, "a cost of 0.0112"),
    ],
)
def test_the_budget_stops_a_run_and_more_of_it_goes_on(capsys, tmp_path, judged, limit, requests, reason):
    with JudgeServer() as server:
        status, out, err = judge(capsys, server, judged, *limit, "--parallel", "2")
        first = len(server.requests)
        assert status == 1
        assert f"The budget of {reason} is spent" in err and f"{first} of 6 judged" in out
        assert 0 < first < 6 and first == (requests or first)
        # With the same budget nothing more is asked, in whichever run.
        assert judge(capsys, server, judged, *limit)[0] == 1
        assert len(server.requests) == first
        assert json.loads((tmp_path / "j.report.json").read_text("utf-8"))["results"]["usage"]["requests"] == first
        assert judge(capsys, server, judged)[0] == 0
    assert sorted(map(number_of, server.requests)) == list(range(6))
    assert [judgement["id"] for judgement in lines(tmp_path / "j.jsonl")] == list(range(6))


def test_retries_count_too(capsys, judged):
    with JudgeServer(lambda request, number: failure(500, retry_after_ms="1")) as server:
        status, _, err = judge(capsys, server, judged, "--max-requests", "5", "--max-retries", "2")
    assert status == 1 and "budget of 5 requests" in err
    assert len(server.requests) == 5


def test_an_endpoint_that_says_no_usage_counts_as_the_most(capsys, judged):
    with JudgeServer(lambda request, number: Reply(usage=None)) as server:
        assert judge(capsys, server, judged, "--max-tokens", "3000")[0] == 1
    assert len(server.requests) == 2


def test_a_reply_that_can_not_be_read_counts_as_the_most(capsys, judged):
    with JudgeServer(lambda request, number: Reply(body=b"{}")) as server:
        assert judge(capsys, server, judged, "--max-tokens", "3000")[0] == 1
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (failure(401, f"Incorrect API key provided: {KEY}"), "refuses"),
        (failure(404, "no such model"), "no such model"),
        (failure(429, "quota", retry_after_ms="1"), "quota"),
    ],
)
def test_an_endpoint_that_refuses_ends_the_run(capsys, tmp_path, judged, reply, message):
    """What was judged before stays; the key is told to nobody, even if the endpoint repeats it."""
    with JudgeServer(lambda request, number: Reply() if number < 2 else reply) as server:
        status, out, err = judge(capsys, server, judged, "--max-retries", "1")
        assert status == 1
        assert message in err and err.count("\n") == 1 and KEY not in err + out
        server.reply = lambda request, number: Reply()
        assert judge(capsys, server, judged)[0] == 0
    answered = [number_of(request) for request in server.requests]
    assert [answered.count(number) for number in range(6)][:2] == [1, 1]


def test_what_a_refusing_endpoint_was_asked_counts_for_all_runs(capsys, tmp_path, judged):
    with JudgeServer(lambda request, number: failure(429, "quota", retry_after_ms="1")) as server:
        for asked in (2, 4, 5):
            assert judge(capsys, server, judged, "--max-retries", "1", "--max-requests", "5")[0] == 1
            assert len(server.requests) == asked
        status, out, err = judge(capsys, server, judged, "--max-requests", "5")
        assert status == 1 and "budget of 5 requests is spent" in err and "0 of 6 judged, 1 error; 5 requests" in out
        assert len(server.requests) == 5
        server.reply = lambda request, number: Reply()
        status, out, _ = judge(capsys, server, judged)
    assert status == 0 and "6 of 6 judged, 0 errors; 11 requests, 660 tokens" in out


def test_no_endpoint(capsys, judged):
    status, _, err = run(capsys, "judge", *judged, "--base-url", "http://127.0.0.1:9/v1", "--max-retries", "0")
    assert status == 1 and "can't be had" in err
    status, _, err = run(capsys, "judge", *judged, "--base-url", "localhost")
    assert status == 1 and "https://HOST/v1" in err


def test_an_interrupted_judge_keeps_what_was_paid_for(capsys, tmp_path, judged):
    def reply(request, number):
        if number == 2:
            signal.raise_signal(signal.SIGINT)  # to the main thread, which waits
        return Reply(seconds=0.05)

    with JudgeServer(reply) as server:
        status, _, err = judge(capsys, server, judged)
        asked = len(server.requests)
        assert status == 130 and f"{asked} of 6 are judged" in err
        assert 3 <= asked < 6
        server.reply = lambda request, number: Reply()
        assert judge(capsys, server, judged)[0] == 0
    assert sorted(map(number_of, server.requests)) == list(range(6))
    assert len(lines(tmp_path / "j.jsonl")) == 6


def test_judgements_belong_to_their_files(capsys, tmp_path, judged):
    with JudgeServer() as server:
        assert judge(capsys, server, judged)[0] == 0
        write(tmp_path / "rules.json", {**RULES, "system": "Be strict."})
        status, _, err = judge(capsys, server, judged, "--report", tmp_path / "other.json")
        assert status == 1 and "begun with other settings: rules was " in err
        assert len(server.requests) == 6
        assert judge(capsys, server, judged, "--overwrite")[0] == 0
        assert len(server.requests) == 12


# --------------------------------------------------------------------------------------------------------------- score


def test_score(capsys, tmp_path, judged):
    """100 · mean of the model's scores / mean of the reference's, over a category or all of a language."""
    pairs = {0: (8, 4), 2: (10, 9), 4: (5, 5), 1: (10, 1), 3: (4, 2), 5: (8, 8)}

    def reply(request, number):
        reference, answer = pairs[number_of(request)]
        return Reply(f"{reference} {answer}")

    with JudgeServer(reply) as server:
        assert judge(capsys, server, judged)[0] == 0
    report = tmp_path / "score.json"
    status, out, err = run(capsys, "score", tmp_path / "j.jsonl", "--report", report)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "| model | language | conversation | detail | complex | average | questions |"
    en, zh = out.splitlines()[2:]
    assert en.startswith("| viscpm | en | 50.0 (50.0–50.0) | 90.0 (90.0–90.0) | 100.0 (100.0–100.0) | 78.3 (")
    assert zh.startswith("| viscpm | zh | 10.0 (10.0–10.0) | 50.0 (50.0–50.0) | 100.0 (100.0–100.0) | 50.0 (")
    average = json.loads(report.read_text("utf-8"))["results"]["viscpm"]["en"]["average"]
    assert average["value"] == pytest.approx(100 * (4 + 9 + 5) / (8 + 10 + 5)) and average["count"] == 3
    assert average["low"] < average["value"] < average["high"]
    assert json.loads(run(capsys, "score", tmp_path / "j.jsonl", "--json")[1])["counts"]["judged"] == 6


def test_score_of_unfinished_judgements(capsys, tmp_path, judged):
    with JudgeServer() as server:
        assert judge(capsys, server, judged, "--max-requests", "3")[0] == 1
    status, out, _ = run(capsys, "score", tmp_path / "j.jsonl")
    assert status == 0
    assert "| viscpm | en | 112.5 (112.5–112.5) | 112.5 (112.5–112.5) | – | 112.5" in out
    status, _, err = run(capsys, "score", tmp_path / "none.jsonl")
    assert status == 1 and "no judgements" in err
    other = write(tmp_path / "other.jsonl", {"id": 1, "question_id": 1, "tuple": [8, 9], "category": "conv"})
    status, _, err = run(capsys, "score", other)
    assert status == 1 and "lack model_id, language" in err
