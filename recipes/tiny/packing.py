"""What the package has no use for is taken out of a saved model."""

from __future__ import annotations

import json
from pathlib import Path


def strip_code(folder: Path) -> None:
    """Removes the code that saved folders carry, and whatever names it or the place that all this comes from."""
    for path in folder.rglob("*.py"):
        path.unlink()
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        for key in ("auto_map", "_name_or_path"):
            content.pop(key, None)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
