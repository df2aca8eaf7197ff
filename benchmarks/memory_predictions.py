"""What `viscpm-hf memory` predicts against what is then taken, on a machine without GPU.

    python benchmarks/memory_predictions.py                        # a random model of 290 M parameters, made for it
    python benchmarks/memory_predictions.py --model DIR --steps int8 int4 --length 16    # any other

Every precision runs in a process of its own: it loads the model, then answers one question to the given length, by the
reference's search or with one beam. `RssAnon`, sampled all the while, is what the process itself needs. The last line
of the output is one JSON object, which also goes to `--output`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import threading
from pathlib import Path

import torch
from convert import memory_of, write_vocabulary
from memory import environment, memory_gb


SAMPLE_SECONDS = 0.005
TARGET = 0.1
QUESTION = "what is in this picture"
# Arguments of `VisCPMChat` for the rows of the table, by precision and place.
STEPS = {
    "fp32": ("fp32", "CPU", {"dtype": "float32"}),
    "half": ("half", "CPU", {"dtype": "bfloat16"}),
    "int8": ("int8", "CPU", {"dtype": "bfloat16", "quantization": "8bit"}),
    "int4": ("int4", "CPU", {"dtype": "bfloat16", "quantization": "4bit"}),
    "disk": (
        "half",
        "CPU + disk",
        {"dtype": "bfloat16", "device_map": {"": "cpu", "model.language_model.layers": "disk"}},
    ),
}


def write_model(folder: Path) -> None:
    """The model of `benchmarks/chat.py`, as a converted folder."""
    from viscpm_hf import (
        CpmBeeTokenizer,
        VisCPMChatConfig,
        VisCPMChatForConditionalGeneration,
        VisCPMChatProcessor,
        VisCPMImageProcessor,
    )

    text = {
        "vocab_size": 86583, "hidden_size": 1024, "num_attention_heads": 8, "head_dim": 128,
        "intermediate_size": 2560, "num_hidden_layers": 12,
    }  # fmt: skip
    vision = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    torch.manual_seed(0)
    model = VisCPMChatForConditionalGeneration(VisCPMChatConfig(text_config=text, vision_config=vision))
    # As the released ones: of a file in the very dtype that is asked for, weights stay mapped, and count as cache.
    model.half().save_pretrained(folder)
    write_vocabulary(folder / "vocab.txt", text["vocab_size"])
    processor = VisCPMChatProcessor(VisCPMImageProcessor(), CpmBeeTokenizer(str(folder / "vocab.txt")))
    processor.save_pretrained(folder)


def load_and_answer(arguments: argparse.Namespace) -> None:
    from PIL import Image

    from viscpm_hf import VisCPMChat

    options = dict(STEPS[arguments.step][2])
    if "device_map" in options:
        options["offload_folder"] = arguments.scratch / "offload"
    else:
        options["device"] = "cpu"
    chat = VisCPMChat(arguments.model, **options)
    end = chat.model.config.text_config.eos_token_id

    def forbid_end(module, args, logits) -> None:
        logits[..., end] = -1e4

    chat.model.lm_head.register_forward_hook(forbid_end)
    generation = {"mode": "generate"} if arguments.beams == 1 else {"num_beams": arguments.beams}
    turn = chat.ask(Image.new("RGB", (64, 64)), QUESTION, max_new_tokens=arguments.length, **generation)
    print(json.dumps({"tokens": turn.num_tokens}))


def prompt_length(arguments: argparse.Namespace) -> int:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(arguments.model if arguments.model.is_dir() else arguments.model.parent)
    document = {"image": "<image>", "context": "", "question": QUESTION, "<ans>": ""}
    return len(processor.encode_prompt(processor.parse_prompt(document)).prompt())


def measure(name: str, arguments: argparse.Namespace) -> float:
    """Peak of RssAnon in bytes."""
    command = [sys.executable, __file__, "--step", name, "--model", str(arguments.model)]
    command += ["--length", str(arguments.length), "--beams", str(arguments.beams)]
    command += ["--scratch", str(arguments.scratch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    peak = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(SAMPLE_SECONDS):
            try:
                peak = max(peak, memory_of(process.pid)[0])
            except (OSError, KeyError):  # it is gone
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode or not output:
        raise SystemExit(f"step {name} failed with exit status {process.returncode}")
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Chat checkpoint; one is made if not given")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--length", type=int, default=128, help="tokens of the answer")
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path(__file__).parent / ".scratch")
    parser.add_argument("--output", type=Path, help="keep the result in this file")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        load_and_answer(arguments)
        return
    if arguments.model is None:
        arguments.model = arguments.scratch / "memory-predictions"
        if not (arguments.model / "processor_config.json").is_file():  # what is written last
            write_model(arguments.model)

    import bitsandbytes
    import transformers

    from viscpm_hf.memory import Machine, Work, memory_plan

    work = Work(prompt_length=prompt_length(arguments), length=arguments.length, beams=arguments.beams)
    plan = memory_plan(arguments.model, machine=Machine(ram=int(memory_gb() * 1e9)), work=work)
    rows = {(row.precision, row.placement): row for row in plan.rows}
    steps = {}
    for name in arguments.steps:
        precision, placement, _ = STEPS[name]
        predicted, measured = rows[precision, placement].peak_ram, measure(name, arguments)
        steps[name] = {
            "predicted_gb": round(predicted / 1e9, 3),
            "measured_gb": round(measured / 1e9, 3),
            "predicted_to_measured": round(predicted / measured, 3),
            "is_within_target": abs(predicted / measured - 1) <= TARGET,
        }
        print(f"{name}: {steps[name]}", file=sys.stderr, flush=True)
    result = {
        "benchmark": "memory_predictions",
        "model": arguments.model.name,
        "parameters": sum(plan.parameters.values()),
        "length": arguments.length,
        "beams": arguments.beams,
        "device": f"{platform.processor() or platform.machine()}, {memory_gb():.0f} GB",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, bitsandbytes)},
        },
        "target": TARGET,
        "steps": steps,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
