"""`viscpm-hf batch --engine ray` writes what it writes without Ray."""

import json

import pytest
from support import Golden

from viscpm_hf.cli import main


pytest.importorskip("ray", reason='the tests on Ray need it: pip install -c constraints.txt ".[ray]"')

GOLDEN = Golden("chat_a")
QUESTIONS = ["what is this?", "图片里有什么？", "why?", "Describe the picture in one sentence, please."]


def run(capsys, *arguments):
    code = main(["batch", *map(str, arguments), "--device", "cpu"])
    return code, capsys.readouterr()


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def test_a_files_lines_are_those_of_the_local_engine(cluster, ray_models, tmp_path, capsys):
    rows = [
        {"id": index, "question": f"{QUESTIONS[index % 4]} {index}", "image": f"image_{index % 3}.png"}
        for index in range(24)
    ]
    rows[5]["image"] = "missing.png"
    del rows[7]["image"]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    common = ("--images", GOLDEN.folder, "--max-new-tokens", 6, "--batch-size", 4)
    for engine in ("local", "ray"):
        output = tmp_path / f"{engine}.jsonl"
        code, printed = run(
            capsys, ray_models / "chat-a", source, output, *common, "--engine", engine,
            *(("--num-processes", 2) if engine == "ray" else ()),
        )  # fmt: skip
        assert code == 0 and "24 rows, 1 error" in printed.out
    assert (tmp_path / "ray.jsonl").read_text("utf-8") == (tmp_path / "local.jsonl").read_text("utf-8")


def test_pictures_of_a_file_are_those_of_the_local_engine(cluster, ray_models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # workers are elsewhere
    write_rows(tmp_path / "rows.jsonl", [{"id": f"p{index}", "prompt": f"一只猫 {index}"} for index in range(3)])
    common = ("--steps", 2, "--size", 16, "--seed", 5, "--no-rank", "--no-check-prompt", "--no-check-image")
    for engine in ("local", "ray"):
        code, _ = run(
            capsys, ray_models / "paint-a", "rows.jsonl", f"{engine}.jsonl", "--images-out", engine, *common,
            "--engine", engine,
        )  # fmt: skip
        assert code == 0
    assert (tmp_path / "ray.jsonl").read_text("utf-8") == (tmp_path / "local.jsonl").read_text("utf-8")
    for file in sorted((tmp_path / "local").iterdir()):
        assert (tmp_path / "ray" / file.name).read_bytes() == file.read_bytes()


def test_what_a_worker_can_not_do_is_one_sentence(cluster, ray_models, tmp_path, capsys):
    source = write_rows(tmp_path / "rows.jsonl", [{"id": 1, "question": "hello"}])
    code, printed = run(
        capsys, ray_models / "chat-a", source, tmp_path / "x.jsonl", "--engine", "ray", "--num-processes", 99
    )
    assert code == 1 and "99 workers were asked for, one a CPU, but the cluster has 2 CPUs." in printed.err
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (ray_models / "chat-a").iterdir():
        (broken / file.name).symlink_to(file)
    (broken / "vocab.txt").unlink()
    (broken / "vocab.txt").write_text("a\n")
    code, printed = run(capsys, broken, source, tmp_path / "y.jsonl", "--engine", "ray")
    assert code == 1 and "A Ray worker failed: " in printed.err
    assert "Traceback" not in printed.err
