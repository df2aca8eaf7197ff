"""`benchmarks/gpu.py`: what it makes of its steps. The steps themselves run in `make gpu ARGS=--dry-run`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", Path(__file__).parent.parent / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gpu", module)  # dataclasses look there
        spec.loader.exec_module(module)
        yield module


def test_a_step_that_hangs_is_ended_and_leaves_what_it_had(gpu):
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code = f"{child}; print('{{\"a\": 1}}'); print('{{\"a\": 2'); import time; time.sleep(60)"
    found = gpu.run(("-c", code), 1.5, True)
    assert (found["status"], found["result"]) == ("time limit", {"a": 1})
    assert found["seconds"] < 10


def test_a_step_that_fails_shows_its_output(gpu):
    found = gpu.run(("-c", "print('{}'); raise SystemExit('what went wrong')"), 30, True)
    assert found["status"] == 1 and "what went wrong" in found["output"] and found["result"] == {}


def test_tests_of_which_none_ran_are_no_success(gpu, tmp_path):
    (tmp_path / "test_it.py").write_text("import pytest\ndef test(): pytest.skip('no device')\n")
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path))
    found = gpu.run((*words, str(tmp_path), "--junitxml", "{scratch}/tests.xml"), 60, True)
    assert found["status"] == "no test ran"
    assert len(found["result"]["skipped"]) == 1 and "no device" in found["result"]["skipped"][0]


def test_targets_beside_their_figures(gpu):
    fast = {"figures_64": {"tokens_per_second fused and compiled, greedy": 119.0, "step ratio of 3 beams": 1.2}}
    paint = {"four_candidates_20_steps_seconds": 2.0, "compiled_four_candidates_20_steps_seconds": 1.1}
    steps = {name: {"result": result} for name, result in (("fast", fast), ("paint", paint))}
    rows = {row["target"]: row for row in gpu.targets_of(steps, False)}
    assert [rows[name]["kept"] for name in ("tokens a second, greedy, fp16", "tokens a second, greedy, int8")] == [
        False,
        None,
    ]
    assert rows["a step of 3 beams over one of 1"]["kept"]
    assert rows["seconds for four images of 20 steps"] == {
        "target": "seconds for four images of 20 steps",
        "limit": "<= 1.2",
        "value": 1.1,
        "kept": True,
    }
    assert all(row["kept"] is None for row in gpu.targets_of(steps, True))
