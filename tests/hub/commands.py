"""The commands, on models of the Hub by every way of naming them; run as a program, as `calls.py` is.

python commands.py IMAGE FOLDER [OPTION ...]    # options of all commands, such as --revision
"""

import contextlib
import io
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

from viscpm_hf.cli import main


image, folder, *options = sys.argv[1:]
rows = Path(folder) / "rows.jsonl"
rows.write_text(json.dumps({"id": 1, "image": image, "question": "颜色"}), "utf-8")
FILE, RELEASE = "openbmb/VisCPM-Chat/pytorch_model.v1.bin", "openbmb/VisCPM-Chat:v1.1"
SHORT = ["--max-new-tokens", "8", "--num-beams", "1"]
CPU = ["--device", "cpu", *options]


def run(*arguments: str) -> tuple[int, str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(list(arguments))
    said = [line for line in err.getvalue().splitlines() if line.startswith("viscpm-hf: error: ")]
    return status, out.getvalue(), "".join(said)


def answer_of(model: str) -> str:
    status, out, error = run("chat", model, image, "颜色", "--json", *SHORT, *CPU)
    assert status == 0, error
    return json.loads(out)["answer"]


found = {"answers": [answer_of(FILE), answer_of(RELEASE)]}
for model in (FILE, RELEASE):
    results = Path(folder) / "results.jsonl"
    status, _, error = run("batch", model, str(rows), str(results), "--overwrite", *SHORT, *CPU)
    assert status == 0, error
    found["answers"].append(json.loads(results.read_text("utf-8"))["answer"])
found["paint"] = []
for model in ("openbmb/VisCPM-Paint:balance", "openbmb/VisCPM-Paint/pytorch_model.balance.bin"):
    file = str(Path(folder) / "drawn.png")
    checked = [
        "--ranker",
        "someone/ranker",
        "--prompt-checker",
        "someone/prompts",
        "--image-checker",
        "someone/images",
    ]
    status, _, error = run("paint", model, "circle", "-o", file, "--size", "16", "--steps", "1", *checked, *CPU)
    found["paint"].append(error or status)
found["inspect"] = run("inspect", FILE, "--json", *options)[::2]
output = str(Path(folder) / "converted")
found["convert"] = run("convert", RELEASE, output, *options)[::2]
# What was recorded of the run, and what merging made of it.
work = Path(folder)
row = {"image": image, "conversations": [{"from": "human", "value": "颜色"}, {"from": "gpt", "value": "红色"}]}
(work / "train.jsonl").write_text(json.dumps(row), "utf-8")
short = ["--max-steps", "1", "--no-tensorboard", *options]
model, adapter = ["--model", "openbmb/VisCPM-Chat"], str(work / "adapter")
train = ["--data", str(work / "train.jsonl"), "--min-image-side", "2", "--output", adapter]
found["train"] = [run("train", "chat", *model, *train, *short)[::2]]
found["train"].append(run("train", "merge", *model, "--adapter", adapter, str(work / "merged"), *options)[::2])
(work / "paint.jsonl").write_text(json.dumps({"image": image, "text": "circle"}), "utf-8")
train = ["--data", str(work / "paint.jsonl"), "--output", str(work / "painter")]
found["train"].append(run("train", "paint", "--model", "someone/paint", *train, "--lora", *short)[::2])
found["recorded"] = "".join(path.read_text("utf-8") for path in work.rglob("training*.json"))
bases = ["chinese-alpaca-plus-7b", "clip-vit-large-patch14", "visualcla-7b-v0.1"]
parts = [f"--{part}-model=ziqingyang/{name}" for part, name in zip(("text", "vision", "lora"), bases, strict=True)]
found["merge"] = run("merge", "visualcla", *parts, str(work / "visualcla"), *options)[::2]
split = ["--to", "text-generation-webui", parts[2], str(work / "halves")]
found["merge"] += run("merge", "visualcla", *split, *options)[::2]
# What is asked between two marks is asked by one command, whose model is here by now.
mark = f"{os.environ['HF_ENDPOINT']}/mark"
for command, model in (("batch", "openbmb/VisCPM-Chat"), ("chat", "openbmb/VisCPM-Chat"), ("chat", RELEASE)):
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(mark)
    arguments = [str(rows), str(work / "again.jsonl")] if command == "batch" else ["", "颜色"]
    assert run(command, model, *arguments, *SHORT, *CPU)[0] == 0
with contextlib.suppress(urllib.error.HTTPError):
    urllib.request.urlopen(mark)
of_the_cache = [option for option in options if option not in ("--token", "hf_words")]
found["memory"] = run("memory", "openbmb/VisCPM-Chat", "--gpu", "none", "--ram", "8GB", *of_the_cache)
found["sibling"] = run("chat", "openbmb/MiniCPM-V-2/pytorch_model.bin", image, "?", *CPU)[::2]
found["unknown"] = run("chat", "openbmb/VisCPM-Chat:v7", image, "?", *CPU)[::2]
found["local"] = run("chat", output, image, "?", *CPU)[::2]
print(json.dumps(found))
