"""What a GPU has to show, in one script of at most nine minutes on a bare machine with an H100 or H200.

    make gpu                     # sets up .venv (some minutes more), writes benchmarks/results/gpu.json
    make gpu ARGS=--dry-run      # every step on the CPU at a tiny size: does it run at all
    make gpu READY= PY=python3   # with an interpreter that has torch with CUDA and all the rest; no network

Every step is a process of its own with its own time limit, and what one leaves of its time goes to those after it: one
that fails or hangs costs no other its result. The JSON is written after each, with the step's exit status, seconds,
last lines and the last JSON object that it printed, and with every target beside its figure: `kept` is null where it
wasn't measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
LIMIT = 540  # seconds for everything
TAIL = 4000  # characters of a failed step's output


# The tests with the marker `cuda`. No others: collecting them takes longer than these run.
TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", "tests/test_cuda.py",
         "tests/modeling/test_beit3.py", "--junitxml", "{scratch}/tests.xml")  # fmt: skip


@dataclass(frozen=True)
class Step:
    name: str
    seconds: int
    """Its limit, beside what the steps before left."""
    words: tuple[str, ...]
    tiny: tuple[str, ...]
    """Of the dry run."""


STEPS = (
    Step("tests", 80, TESTS, TESTS),
    Step("fast", 210, ("fast.py", "--cuda", "--as-it-comes"), ("fast.py", "--quick", "--stages", "cuda")),
    Step(
        "paint", 110,
        ("paint.py", "--compile", "--only-four", "--as-it-comes", "--rounds", "2", "--steps", "20", "--batches", "1"),
        ("paint.py", "--compile", "--only-four", "--quick"),
    ),
    Step("full_size", 110, ("full_size.py", "--as-it-comes"), ("full_size.py", "--tiny")),
    Step("streaming", 30, ("streaming.py", "--layers", "24"), ("streaming.py", "--layers", "6", "--tiny")),
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A figure of a step, and what it is to be."""

    name: str
    step: str
    paths: tuple[tuple[str, ...], ...]
    """Where it stands in the step's JSON, the first that is there; `*` ends a key of which only the beginning is
    known."""
    limit: float | bool
    is_maximum: bool = False
    only_on_a_gpu: bool = False

    def value(self, result: Mapping[str, Any]) -> Any:
        """None if it wasn't measured."""
        for path in self.paths:
            found: Any = result
            for key in path:
                if key.endswith("*") and isinstance(found, Mapping):
                    key = next((it for it in found if it.startswith(key[:-1])), key)
                found = found.get(key) if isinstance(found, Mapping) else None
            if found is not None:
                return found
        return None

    def is_kept(self, value: Any) -> bool | None:
        if value is None or isinstance(self.limit, bool):
            return value
        return value <= self.limit if self.is_maximum else value >= self.limit


def speed(name: str, way: str, limit: int, **options: bool) -> Target:
    path = ("figures_*", f"tokens_per_second {way}, greedy")
    return Target(f"tokens a second, greedy, {name}", "fast", (path,), limit, **options)


TARGETS = (
    speed("fp16", "fused and compiled", 120),
    speed("int8", "int8wo, compiled", 180),
    speed("int4", "int4wo, compiled", 230, only_on_a_gpu=True),
    Target("a step of 3 beams over one of 1", "fast", (("figures_*", "step ratio of 3 beams"),), 1.3, True),
    Target("tokens of 16 rows over those of 1", "fast", (("figures_*", "throughput ratio of batch 16"),), 8),
    Target(
        "seconds for four images of 20 steps", "paint",
        (("compiled_four_candidates_20_steps_seconds",), ("four_candidates_20_steps_seconds",)), 1.2, True,
    ),
    Target("share of the bus that streamed layers reach", "streaming", (("share_of_bus",),), 0.8),
    *(
        Target(f"full size, {way}", "full_size", (("ways", way, "kept"),), True, only_on_a_gpu=is_gpu_s)
        for way, is_gpu_s in (
            ("half", False), ("nf4", False), ("int8", False), ("int8wo", False), ("int4wo", True), ("ram", True),
            ("disk", False), ("two_gpus", True),
        )
    ),
)  # fmt: skip


def environment(is_dry: bool) -> dict[str, str]:
    paths = [str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own, **({"VISCPM_TEST_DEVICE": "cpu"} if is_dry else {})}


def run(words: Sequence[str], limit: float, is_dry: bool) -> dict[str, Any]:
    """What came of a step, however it ended."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [word.format(scratch=scratch) if "{scratch}" in word else word for word in words]
        command = [sys.executable, *(words if words[0].startswith("-") else [str(HERE / words[0]), *words[1:]])]
        output_file = Path(scratch, "output")
        begin = time.perf_counter()
        # To a file: what outlives a killed step could hold a pipe open for ever.
        with open(output_file, "wb") as output:
            process = subprocess.Popen(
                command, cwd=HERE.parent, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=environment(is_dry),
            )  # fmt: skip
            try:
                status: Any = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = "time limit"
            finally:
                end(process)
        found = {"status": status, "seconds": round(time.perf_counter() - begin, 1), "command": " ".join(words)}
        text = output_file.read_text("utf-8", "replace")
        counts = Path(scratch, "tests.xml")
        if "--junitxml" in words:
            found["result"] = count_tests(counts) if counts.is_file() else {}
            if status == 0 and not found["result"].get("passed"):
                found["status"] = "no test ran"
        else:
            found |= last_object(text)
        return found if found["status"] == 0 else {**found, "output": text[-TAIL:]}


def end(process: subprocess.Popen) -> None:
    """Ends a step and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def last_object(text: str) -> dict[str, Any]:
    """The last whole JSON object among the lines, as `{"result": ...}`."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return {"result": json.loads(line)}
            except json.JSONDecodeError:  # cut off by the limit
                continue
    return {}


def count_tests(path: Path) -> dict[str, Any]:
    counts: dict[str, Any] = {"passed": 0, "failed": [], "skipped": []}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"].append(name)
        elif case.find("skipped") is not None:
            counts["skipped"].append(f"{name}: {case.find('skipped').get('message')}")
        else:
            counts["passed"] += 1
    return counts


def targets_of(steps: Mapping[str, Any], is_dry: bool) -> list[dict[str, Any]]:
    """Every target beside its figure; a dry run's figures are those of tiny models, of which nothing is asked."""
    rows = []
    for target in TARGETS:
        value = target.value(steps.get(target.step, {}).get("result", {}))
        bound = f"{'<=' if target.is_maximum else '>='} {target.limit}"
        limit = target.limit if isinstance(target.limit, bool) else bound
        kept = None if is_dry else target.is_kept(value)
        rows.append({"target": target.name, "limit": limit, "value": value, "kept": kept})
    return rows


def machine() -> Iterator[tuple[str, Any]]:
    import torch

    from viscpm_hf.modeling.fast_decoding import compilation_problem

    devices = range(torch.cuda.device_count())
    yield "devices", [torch.cuda.get_device_name(index) for index in devices] or ["none"]
    yield "gpu_gb", [round(torch.cuda.get_device_properties(index).total_memory / 1e9, 1) for index in devices]
    yield "ram_gb", round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    yield "cores", os.cpu_count()
    yield "python", sys.version.split()[0]
    yield "cuda", torch.version.cuda
    yield "not_compiled_because", compilation_problem(None, torch.device("cuda" if devices else "cpu"))
    for name in ("torch", "triton", "transformers", "diffusers", "accelerate", "bitsandbytes", "torchao"):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at a tiny size")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu.json")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent / "src"))
    import torch

    begin = time.perf_counter()
    if not (options.dry_run or torch.cuda.is_available()):
        reason = f"torch {torch.__version__} is a build for CPUs"
        if torch.version.cuda is not None:
            reason = f"no driver answers, or one too old for CUDA {torch.version.cuda}"
        parser.error(f"no CUDA device can be used ({reason}): --dry-run shows whether the steps run at all")
    report: dict[str, Any] = {"benchmark": "gpu", "dry_run": options.dry_run, **dict(machine()), "steps": {}}
    steps = [step for step in STEPS if options.steps is None or step.name in options.steps]
    for place, step in enumerate(steps):
        later = sum(it.seconds for it in steps[place + 1 :])
        limit = max(LIMIT - later - (time.perf_counter() - begin), 1)
        found = run(step.tiny if options.dry_run else step.words, limit, options.dry_run)
        report["steps"][step.name] = found
        report["targets"] = targets_of(report["steps"], options.dry_run)
        report["seconds"] = round(time.perf_counter() - begin, 1)
        print(f"{step.name}: {found['status']}, {found['seconds']} s", file=sys.stderr, flush=True)
        if not options.dry_run:
            options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for row in report["targets"]:
        verdict = {True: "kept", False: "MISSED", None: "not measured"}[row["kept"]]
        print(f"{row['target']:46}{row['value']!s:>22}  {row['limit']!s:9} {verdict}", file=sys.stderr)
    print(json.dumps(report, ensure_ascii=False))
    missing = [
        target.name
        for target, row in zip(TARGETS, report["targets"], strict=True)
        if row["value"] is None and target.step in report["steps"] and not target.only_on_a_gpu
    ]
    if missing:
        print(f"without a figure: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing or any(found["status"] != 0 for found in report["steps"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
