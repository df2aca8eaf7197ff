"""What a path is, is found out once: a load opens no file twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

from sibling_folders import write_folder
from support import Golden


def test_weights_and_json_files_are_opened_once(tmp_path):
    chat = Golden("chat_a").write_layout(tmp_path / "chat", "chat with vision.json")
    sibling = write_folder("omnilmm", tmp_path / "omnilmm")
    command = [sys.executable, str(Path(__file__).with_name("opened.py")), str(chat), str(sibling)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    weights = {path.name for path in (*chat.iterdir(), *sibling.iterdir()) if path.suffix in (".bin", ".safetensors")}
    for way, files in found.items():
        assert {name: count for name, count in files.items() if count > 1} == {}, way
        assert weights & set(files) and "config.json" in files, way
