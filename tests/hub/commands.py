"""The commands, on models of the Hub by every way of naming them; run as a program, as `calls.py` is.

python commands.py IMAGE FOLDER [OPTION ...]    # options of all commands, such as --revision
"""

import contextlib
import io
import json
import sys
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
    unchecked = ["--no-rank", "--no-check-prompt", "--no-check-image"]
    status, _, error = run("paint", model, "circle", "-o", file, "--size", "16", "--steps", "1", *unchecked, *CPU)
    found["paint"].append(error or status)
found["inspect"] = run("inspect", FILE, "--json", *options)[::2]
output = str(Path(folder) / "converted")
found["convert"] = run("convert", RELEASE, output, *options)[::2]
found["sibling"] = run("chat", "openbmb/MiniCPM-V-2/pytorch_model.bin", image, "?", *CPU)[::2]
found["unknown"] = run("chat", "openbmb/VisCPM-Chat:v7", image, "?", *CPU)[::2]
found["local"] = run("chat", output, image, "?", *CPU)[::2]
print(json.dumps(found))
