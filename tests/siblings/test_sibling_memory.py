"""`viscpm-hf memory` of the siblings, against their sizes and what they take."""

import json
import shlex

import pytest
import torch
from sibling_folders import NAMES
from transformers import AutoModelForImageTextToText

from viscpm_hf import memory_plan
from viscpm_hf.cli.main import build_parser, main
from viscpm_hf.memory import Machine, Work
from viscpm_hf.memory.sizes import model_sizes
from viscpm_hf.memory.work import kv_bytes


MACHINE = Machine(ram=int(64e9), gpu=int(24e9), ram_bandwidth=20e9, cpu_flops=1e12)
SMALL_WORK = {"length": 8, "prompt_length": 64}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("openbmb/OmniLMM-12B", 11.61e9),
        ("openbmb/MiniCPM-V", 3_434_965_792),
        ("openbmb/MiniCPM-V-2", 3_434_965_792),
        ("ziqingyang/visualcla-7b-v0.1", 7.27e9),
    ],
)
def test_released_sizes_are_known_without_the_checkpoint(name, parameters):
    sizes = model_sizes(name)
    assert sum(sizes.parameters.values()) == pytest.approx(parameters, rel=5e-4)
    if isinstance(parameters, int):
        assert sum(sizes.parameters.values()) == parameters
    weights = sum(sizes.weights(torch.bfloat16).values())
    assert weights == pytest.approx(2 * parameters, rel=5e-4)
    nf4, int8 = (sum(sizes.weights(torch.bfloat16, name).values()) for name in ("nf4", "int8"))
    assert nf4 < int8 < weights


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_loaded_models(whole_folders, name):
    """Computed buffers that no file has are in memory, too."""
    model = AutoModelForImageTextToText.from_pretrained(whole_folders[name], dtype="float32")
    loaded = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert sum(model_sizes(whole_folders[name]).weights(torch.float32).values()) == loaded


@pytest.mark.parametrize("name", NAMES)
def test_cache_is_what_generation_leaves(whole_folders, name):
    """OmniLMM's language model has half as many heads for keys and values as for queries."""
    model = AutoModelForImageTextToText.from_pretrained(whole_folders[name], dtype="float32").eval()
    output = model.generate(
        torch.arange(5, 17)[None], max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True,
        eos_token_id=2,
    )  # fmt: skip
    places = output.past_key_values.get_seq_length()
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    work = Work(prompt_length=12, length=places - 12, beams=1)
    assert kv_bytes(model_sizes(whole_folders[name]), work, torch.float32) == taken


@pytest.mark.parametrize("name", NAMES)
def test_every_recommended_command_is_one(whole_folders, name, capsys):
    arguments = ["memory", str(whole_folders[name]), "--gpu", "8GB", "--ram", "16GB", "--json"]
    assert main([*arguments, "--length", "8", "--prompt-length", "64"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["kind"] == "chat" and plan["title"] in (
        "OmniLMM-12B",
        "MiniCPM-V 1.0",
        "MiniCPM-V 2.0",
        "VisualCLA-7B",
    )
    placements = {row["placement"] for row in plan["rows"]}
    assert placements == {"GPU", "CPU", "CPU + disk"}  # streaming layers is VisCPM's
    for row in plan["rows"]:
        parsed = build_parser().parse_args(shlex.split(row["command"])[1:])
        assert parsed.command == "chat" and row["tokens_per_second"] > 0
        is_plain_on_gpu = row["placement"] == "GPU" and row["precision"] in ("fp32", "half")
        fast = row["tokens_per_second_fast"]
        assert fast > row["tokens_per_second"] if is_plain_on_gpu else fast is None


def test_work_is_as_the_original_does_it():
    assert memory_plan("openbmb/MiniCPM-V", machine=MACHINE, work={"length": 100}).work == Work(164, 100, 3)
    plan = memory_plan("openbmb/MiniCPM-V-2", machine=MACHINE)
    assert plan.work == Work(740, 1024, 1)  # ten views of 64 tokens, sampling
    assert plan.best.precision == "half" and plan.best.dtype == "bfloat16"
