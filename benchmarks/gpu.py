"""What a GPU has to show, in one script of at most nine minutes on a bare machine with an H100 or H200.

    make gpu                     # writes benchmarks/results/gpu.json
    make gpu ARGS=--dry-run      # every step on the CPU at a tiny size: does it run at all

Every step is a process of its own with its own time limit: one that fails or hangs costs no other its result. The JSON
is written after each, with the step's exit status, seconds, last lines and the last JSON object that it printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
LIMIT = 540  # seconds for everything
TAIL = 2000  # characters of a failed step's output


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
# What runs on the GPU where there is one: transformers' own tests of our classes, placement, streaming, quantisation.
TESTS = (
    "tests/modeling/test_beit3.py", "tests/modeling/test_modeling_viscpm_chat.py", "tests/test_placement.py",
    "tests/test_layer_streaming.py", "tests/test_quantization.py",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    name: str
    seconds: int
    """Its limit."""
    words: tuple[str, ...]
    tiny: tuple[str, ...] | None
    """Of the dry run; None where nothing of it runs without a GPU."""


# The most telling first, should the time run out.
STEPS = (
    Step("fast", 150, ("fast.py", "--cuda", "--rounds", "2"), ("fast.py", "--quick")),
    Step("paint", 100, ("paint.py", "--compile"), ("paint.py", "--quick")),
    Step("streaming", 70, ("streaming.py",), ("streaming.py", "--layers", "6", "--tiny")),
    Step("tests", 200, (*PYTEST, *TESTS), (*PYTEST, "tests/modeling/test_beit3.py", "-k", "test_config")),
)


def run(step: Step, words: tuple[str, ...], limit: float) -> dict[str, Any]:
    """What came of a step, however it ended."""
    command = [sys.executable, *words] if words[0] == "-m" else [sys.executable, str(HERE / words[0]), *words[1:]]
    begin = time.perf_counter()
    with subprocess.Popen(
        command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=limit)
            status: Any = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its workers, too
            output, status = process.communicate()[0], "time limit"
    found = {"status": status, "seconds": round(time.perf_counter() - begin, 1), "command": " ".join(words)}
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return {**found, "result": json.loads(line)}
            except json.JSONDecodeError:
                break
    return {**found, "output": output[-TAIL:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at a tiny size")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu.json")
    options = parser.parse_args()
    import torch

    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("there is no CUDA device here: --dry-run shows whether the steps run at all")
    report: dict[str, Any] = {
        "benchmark": "gpu",
        "dry_run": options.dry_run,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["none"],
        "torch": torch.__version__,
        "steps": {},
    }
    begin = time.perf_counter()
    for step in STEPS:
        words = step.tiny if options.dry_run else step.words
        left = LIMIT - (time.perf_counter() - begin)
        if words is None or (options.steps and step.name not in options.steps):
            continue
        found = run(step, words, min(step.seconds, left)) if left > 1 else {"status": "no time left"}
        report["steps"][step.name] = found
        print(f"{step.name}: {found['status']}, {found.get('seconds', 0)} s", file=sys.stderr, flush=True)
        if not options.dry_run:
            options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(report, ensure_ascii=False))
    return 0 if all(found["status"] == 0 for found in report["steps"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
