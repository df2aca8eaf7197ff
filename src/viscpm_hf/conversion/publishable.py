"""What a folder that goes to the Hub may hold: a list of what belongs there, not of what doesn't."""

from __future__ import annotations

import json
import os
import pickletools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from .. import modeling
from ..checkpoints.errors import ConversionError
from ..checkpoints.headers import safetensors_header, weight_files
from ..checkpoints.location import MANIFEST_NAME, json_object
from ..plain_text import plain
from .plan import DIFFUSERS_WEIGHTS, EXTRAS_NAME, TRANSFORMERS_WEIGHTS


CARD_NAME = "README.md"
CONFIGURATIONS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "scheduler_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt",
)  # fmt: skip
ABOUT = (CARD_NAME, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "CITATION.cff")
OWN = (MANIFEST_NAME, EXTRAS_NAME, "model_index.json")
# Folders of pictures that a card may show; they may also lie beside it.
PICTURE_FOLDERS = ("assets", "figures", "images")
PICTURES = {".png": b"\x89PNG\r\n", ".jpg": b"\xff\xd8", ".jpeg": b"\xff\xd8", ".gif": b"GIF8", ".webp": b"RIFF"}
TEXTS = (".json", ".jinja", ".md", ".txt", ".py", ".cff", "")

# What tools of the Hub and of desktops leave; it isn't sent, and no reason to stop.
LEFT_BEHIND = (".cache", ".gitattributes", ".gitignore", ".DS_Store")

# Formats that may run code when they are loaded, programs, and keys: not even if asked for by name.
NEVER = (
    ".bin", ".pt", ".pt2", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib", ".msgpack", ".h5",
    ".pyc", ".pyo", ".so", ".dll", ".exe", ".sh", ".zip", ".tar", ".gz", ".pem", ".key", ".p12", ".pfx", ".kdbx",
)  # fmt: skip
SECRET_NAME = re.compile(
    r"secret|credential|password|api_?key|((access|auth|hf)_?)?tokens?(?![a-z])|id_(rsa|dsa|ecdsa|ed25519)|netrc", re.I
)
# What a converted folder carries of this package's code: named as we named it.
OWN_CODE = frozenset(path.name for path in Path(modeling.__path__[0]).glob("*.py"))
# Tokens of the Hub, of OpenAI's and Amazon's kind, and private keys.
SECRET = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{32,}|\bAKIA[A-Z0-9]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY"
)

# Configurations, code and cards are small; vocabularies hold no secrets.
MAX_SEARCHED_BYTES = 2 * 2**20
MAX_PICKLE_BYTES = 2 * 2**20


def publishable_files(folder: Path, include: Iterable[str] = ()) -> dict[str, int]:
    """The files of a converted folder with their sizes.

    Args:
        include: further files by their names in the folder.

    Raises:
        ConversionError: if there is anything else in it, or a file isn't what its name says.
        OSError: if files can't be read, or a shard is missing.
    """
    index = json_object(folder / "model_index.json")
    parts = [name for name, value in index.items() if isinstance(value, list) and name.isidentifier()]
    allowed, extra = _allowed(folder, parts), set(include)
    files = {}
    for path in _walk(folder, {*parts, *PICTURE_FOLDERS, *(name.partition("/")[0] for name in extra)}):
        name = path.relative_to(folder).as_posix()
        _refuse_if_never(path, name)
        if not (name in allowed or name in extra or _is_picture(name)):
            raise ConversionError(
                f"{plain(path)} doesn't belong to a converted folder and isn't published: move it away, or add it by "
                f"name (--include {plain(name)})."
            )
        _check_contents(path)
        files[name] = path.stat().st_size
    missing = sorted(extra - set(files))
    if missing:
        raise FileNotFoundError(f"{folder} has no {plain(missing[0])}, which was to be published too.")
    return files


def _allowed(folder: Path, parts: list[str]) -> set[str]:
    """Names of all files that a conversion, or `save_pretrained`, writes into such a folder."""
    package = Path(__file__).parents[1]
    code = [path.name for room in ("modeling", "pipelines") for path in (package / room).glob("[a-z]*.py")]
    allowed = {*ABOUT, *OWN, *CONFIGURATIONS, *code}
    for part in ("", *parts):
        prefix = f"{part}/" if part else ""
        allowed |= {f"{prefix}{name}" for name in (*CONFIGURATIONS, *code)}
        for weights in (TRANSFORMERS_WEIGHTS, DIFFUSERS_WEIGHTS):
            whole, index = (folder / part / f"{weights}.safetensors{suffix}" for suffix in ("", ".index.json"))
            if whole.exists() or index.exists():
                allowed |= {f"{prefix}{name}" for name in (*weight_files(folder / part, weights), index.name)}
    return allowed


def _walk(folder: Path, known: set[str]) -> Iterator[Path]:
    """Files in order.

    Raises:
        ConversionError: for links, and for folders that aren't known; what lies in them isn't looked at.
    """
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = folder / entry.name
        if entry.name in LEFT_BEHIND:
            continue
        if entry.is_symlink():
            raise ConversionError(f"{plain(path)} is a symbolic link; only files are published.")
        if entry.is_dir():
            if entry.name not in known:
                raise ConversionError(
                    f"{plain(path)} doesn't belong to a converted folder and isn't published: move it away."
                )
            yield from _walk(path, set())
        elif entry.is_file():
            yield path
        else:
            raise ConversionError(f"{plain(path)} is no file.")


def _is_picture(name: str) -> bool:
    parent = os.path.dirname(name)
    return os.path.splitext(name)[1].lower() in PICTURES and (not parent or parent in PICTURE_FOLDERS)


def _refuse_if_never(path: Path, name: str) -> None:
    reason = None
    if any(part.startswith(".") for part in name.split("/")):
        reason = "is hidden"
    elif path.suffix.lower() in NEVER or path.suffix != ".safetensors" and is_pickle(path):
        reason = "is a pickle, or of another kind that may run code or hide something"
    elif SECRET_NAME.match(path.name) and path.name not in OWN_CODE:
        reason = "may hold a secret, by its name"
    if reason is not None:
        raise ConversionError(f"{plain(path)} {reason}, which is never published: move it away.")


def _check_contents(path: Path) -> None:
    """Raises [`ConversionError`] for a file that isn't of the kind that its name says, or holds a secret."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        safetensors_header(path)
        return
    content = path.read_bytes()
    wrong = None
    if suffix in PICTURES:
        wrong = None if content.startswith(PICTURES[suffix]) else "picture"
    elif suffix in TEXTS:
        try:
            text = content.decode("utf-8")
            if suffix == ".json":
                json.loads(text)
            wrong = "text" if "\0" in text else None
        except (ValueError, RecursionError):
            wrong = "JSON" if suffix == ".json" else "text"
    if wrong is not None:
        raise ConversionError(f"{plain(path)} holds no {wrong}, although its name says so: it isn't published.")
    if len(content) <= MAX_SEARCHED_BYTES and (found := SECRET.search(content)):
        raise ConversionError(
            f"{plain(path)} holds what looks like a key ({found[0][:6].decode('ascii')}...), which is never "
            "published: remove it."
        )


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle or an archive with one, whatever its name."""
    with path.open("rb") as file:
        content = file.read(MAX_PICKLE_BYTES)
    if content.startswith(b"PK\x03\x04") or (content[:1] == b"\x80" and content[1:2] in b"\2\3\4\5"):
        return True
    # Of the oldest protocols, in letters: to the end in opcodes, of which at least one builds something.
    names = set()
    try:
        for opcode, _, _ in pickletools.genops(content):
            names.add(opcode.name)
    except Exception:  # noqa: BLE001, of many kinds
        return False
    return bool(names & {"GLOBAL", "INST", "REDUCE", "OBJ", "BUILD"})
