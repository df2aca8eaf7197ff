"""A folder whose files name code of its own: no command runs it, and none asks whether to."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
from support import GOLDEN

import viscpm_hf
from viscpm_hf.cli import main


IMAGE = str(GOLDEN / "chat_a" / "image_0.png")
COMMANDS = {
    "chat": lambda folder: ["chat", folder, IMAGE, "hi", "--max-new-tokens", "1"],
    "inspect": lambda folder: ["inspect", folder],
    "convert": lambda folder: ["convert", folder, f"{folder}-out", "--to", "original"],
    "memory": lambda folder: ["memory", folder],
    "publish": lambda folder: ["publish", folder, "a/b", "--dry-run"],
    "paint": lambda folder: ["paint", folder, "hi", "-o", f"{folder}.png", "--no-rank", "--no-check-prompt"],
}
AUTO = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "AutoTokenizer",
    "AutoImageProcessor",
)


def foreign(folder: Path, name: str, **changes) -> None:
    content = json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else {}
    content |= {"auto_map": dict.fromkeys(AUTO, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", None]}, **changes}
    (folder / name).write_text(json.dumps(content))


CHANGES = {
    "config": lambda folder: foreign(folder, "config.json", model_type="viscpm_chat_v2"),
    "config of ours": lambda folder: foreign(folder, "config.json"),
    "tokenizer": lambda folder: foreign(folder, "tokenizer_config.json", tokenizer_class="Evil"),
    "processor": lambda folder: foreign(folder, "processor_config.json", processor_class="Evil"),
    "image processor": lambda folder: foreign(folder, "preprocessor_config.json", image_processor_type="Evil"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_asks_or_runs(tmp_path, monkeypatch, capsys, command, change):
    folder, mark = tmp_path / "model", tmp_path / "it ran"
    shutil.copytree(viscpm_hf.tiny("chat"), folder)
    for name in ("evil.py", "generate.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    CHANGES[change](folder)
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    status = main(COMMANDS[command](str(folder)))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("viscpm-hf: error: ")]
    assert not mark.exists() and not asked
    assert len(errors) == (status != 0)
