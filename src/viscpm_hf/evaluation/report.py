"""What every evaluation writes beside its results: what was measured, how, with what, and what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..batch.results import replace_text
from ..checkpoints.location import repository_of
from ..tiny.embedded import resolve_model
from ..version import __version__
from .statistics import CONFIDENCE


LIBRARIES = ("torch", "transformers", "diffusers", "bitsandbytes", "torchmetrics", "openai", "numpy", "pillow")

# Of a large file these bytes at both its ends tell versions apart; reading all of it takes minutes.
SAMPLE_BYTES = 1 << 20


def model_identity(name_or_path: str | os.PathLike, kind: str, **hub: Any) -> dict[str, Any]:
    """Which model it is: a Hub id's commit, or a fingerprint of local files (names, sizes, and the first and last
    MiB of each).

    Args:
        kind: `"chat"` or `"paint"`.
        hub: `revision` and `cache_dir` of the Hub.
    """
    path = Path(resolve_model(name_or_path, kind))
    identity: dict[str, Any] = {"name": os.fspath(name_or_path), "revision": None, "fingerprint": None}
    if path.exists():
        identity["fingerprint"] = fingerprint(path)
    else:
        identity["revision"] = cached_revision(os.fspath(name_or_path), **hub)
    return identity


def known_by(name_or_path: str | os.PathLike, kind: str) -> str:
    """What is the same for the same model, also where it was moved: its fingerprint, of a Hub id the name."""
    identity = model_identity(name_or_path, kind)
    return identity["fingerprint"] or identity["name"]


def fingerprint(path: Path) -> str:
    """Of a file, or of all files of a folder; hidden ones aside."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    names = {file.relative_to(path).as_posix() if path.is_dir() else file.name: file for file in files}
    digest = hashlib.sha256()
    for name, file in sorted(names.items()):
        if any(part.startswith(".") for part in name.split("/")):
            continue
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with open(file, "rb") as content:
            digest.update(content.read(SAMPLE_BYTES))
            content.seek(max(SAMPLE_BYTES, size - SAMPLE_BYTES))
            digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()


def cached_revision(name: str, revision: str | None = None, cache_dir: str | os.PathLike | None = None) -> str | None:
    """The commit of a Hub repository, or of one of its files, in the local cache; None if it isn't there."""
    from huggingface_hub import try_to_load_from_cache

    repo_id = os.fspath(repository_of(name))
    for file in ("config.json", "model_index.json"):
        found = try_to_load_from_cache(repo_id, file, cache_dir=cache_dir, revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def versions() -> dict[str, str]:
    found = {"viscpm_hf": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def make_report(
    evaluation: str,
    *,
    settings: dict[str, Any],
    seeds: dict[str, Any],
    counts: dict[str, Any],
    results: dict[str, Any],
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A report of an evaluation; `results` hold estimates with their intervals."""
    return {
        "evaluation": evaluation,
        "model": model,
        "settings": settings,
        "seeds": seeds,
        "counts": counts,
        "confidence": CONFIDENCE,
        "results": results,
        "versions": versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes a report as a whole or not at all."""
    replace_text(path, json.dumps(report, ensure_ascii=False, indent=2) + "\n")


def report_path(output: Path) -> Path:
    """Where the report of an output lies: `answers.jsonl` -> `answers.report.json`."""
    return output.with_name(f"{output.stem}.report.json")
