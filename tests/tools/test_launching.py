"""`accelerate launch` with the shipped configurations: two processes train what one does with accumulation."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


EXAMPLES = Path(__file__).parents[2] / "examples" / "accelerate"
DEEPSPEED = pytest.mark.skipif(
    not (find_spec("deepspeed") and find_spec("ninja")), reason="DeepSpeed and ninja are not installed"
)
QUESTIONS = [("What colour is the shape?", "Red."), ("How many shapes are there?", "Two."), ("有几个图形？", "三个。")]


@pytest.fixture(scope="module")
def command(chat_folder, pictures, tmp_path_factory) -> list:
    data = tmp_path_factory.mktemp("data") / "train.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        for number in range(8):
            question, answer = QUESTIONS[number % 3]
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            row = {"image": str(pictures[number % 4]), "conversations": turns}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    options = ["--model", chat_folder, "--data", data, "--full", "--precision", "fp32", "--weights", "fp32"]
    return ["-m", "viscpm_hf.cli", "train", "chat", *options, "--max-steps", 2, "--batch-size", 2, "--warmup", 0]


@pytest.fixture(scope="module")
def alone(command, run_python, tmp_path_factory) -> dict[str, torch.Tensor]:
    output = tmp_path_factory.mktemp("alone") / "out"
    run_python(*command, "--accumulation", 2, "--output", output)
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["ddp", pytest.param("zero2", marks=DEEPSPEED), pytest.param("zero3", marks=DEEPSPEED)]
)
def test_two_processes(name, command, alone, chat_folder, run_python, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--config_file", EXAMPLES / f"{name}.yaml"]
    run_python(
        *launch, "--num_processes", 2, "--main_process_port", 0, "--mixed_precision", "no", *command,
        "--output", tmp_path / "out", timeout=900,
    )  # fmt: skip
    together = load_file(tmp_path / "out" / "model.safetensors")
    assert together.keys() == alone.keys()
    before = load_file(chat_folder / "model.safetensors")
    assert any(not torch.equal(tensor.float(), before[key].float()) for key, tensor in alone.items() if key in before)
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, atol=1e-4, rtol=1e-3, msg=key)
