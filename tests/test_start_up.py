"""`import viscpm_hf` and the command line import neither torch nor transformers; whichever is used first, our classes
are registered then."""

import os
import shutil
import subprocess
import sys

import pytest

from viscpm_hf import tiny


HEAVY = "{'torch', 'transformers', 'diffusers', 'huggingface_hub', 'numpy'} & set(sys.modules)"


def in_a_new_process(*statements: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(statements)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["--help"],
        ["--hlep"],
        *([name, "--no-such"] for name in ("chat", "paint", "train", "serve", "eval")),
    ],
)
def test_the_command_line_is_read_before_anything_heavy_is_imported(words):
    in_a_new_process(
        "import sys",
        "from viscpm_hf.cli import main",
        "try:",
        f"    main({words})",
        "except SystemExit:",
        "    pass",
        f"assert not {HEAVY}, {HEAVY}",
    )


# What a program may do first, each in a process of its own, forked from one in which torch is.
FIRST = (
    "import viscpm_hf; from transformers import GenerationMixin",
    "from transformers import AutoModel; import viscpm_hf",
    "import viscpm_hf; from diffusers import DiffusionPipeline",
    "from viscpm_hf.modeling.modeling_cpm_bee import CpmBeeModel",
    "import viscpm_hf, importlib.util; importlib.util.find_spec('transformers.modeling_utils')",
    "from viscpm_hf.conversion.inspect import inspect",
    # Threads that find each other's modules half there.
    "import viscpm_hf, transformers as used; in_threads('AutoModel', 'AutoTokenizer', 'AutoProcessor', 'AutoConfig')",
    "import transformers as used, viscpm_hf; in_threads('AutoModel', 'AutoTokenizer', 'AutoProcessor', 'AutoConfig')",
    "import viscpm_hf as used; in_threads('VisCPMChat', 'VisCPMPaint', 'CpmBeeConfig', 'memory_plan')",
)


def test_whatever_is_used_first_finds_our_classes_registered():
    in_a_new_process(
        "import os, sys, torch, numpy",
        "from concurrent.futures import ThreadPoolExecutor",
        "in_threads = lambda *names: [*ThreadPoolExecutor(len(names)).map(lambda name: getattr(used, name), names)]",
        f"for first in {FIRST}:",
        "    if os.fork():",
        "        continue",
        "    exec(first)",
        "    import transformers",
        f"    config = transformers.AutoConfig.from_pretrained({tiny('chat')!r})",
        "    model_class = transformers.AutoModelForImageTextToText._model_mapping[type(config)]",
        "    import viscpm_hf",
        "    from viscpm_hf.registration import register_models",
        "    waiting = [finder for finder in sys.meta_path if getattr(finder, 'act', None) is register_models]",
        "    os._exit(model_class is not viscpm_hf.VisCPMChatForConditionalGeneration or bool(waiting))",
        f"assert not any(os.wait()[1] for _ in {FIRST})",
    )


def test_the_garbage_collector_waits_for_the_libraries_alone(tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(tiny("chat"), folder)
    config = (folder / "config.json").read_text("utf-8")
    (folder / "config.json").write_text(config.replace("{", '{"known_to_the_class_alone": 1,', 1), "utf-8")
    in_a_new_process(
        "import gc, sys",
        "rounds = lambda: gc.get_stats()[2]['collections']",
        "before = rounds()",
        "from viscpm_hf.cli import main",
        f"assert main(['inspect', {os.fspath(folder)!r}]) == 0 and 'transformers' in sys.modules",
        "assert gc.isenabled() and rounds() - before < 4, rounds() - before",
        "import atexit",
        "atexit._run_exitfuncs()",
        "assert gc.get_freeze_count() > 100_000",
    )
