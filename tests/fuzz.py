"""Spoilt files for a bounded time: whatever is read ends in a value or in one of the errors that are promised, within
seconds and in bounded memory.

    python tests/fuzz.py --seconds 60 [--seed 7] [--target archive]

An input that breaks a promise is written to a file, whose name is printed with the seed that made it.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors.torch import save

from viscpm_hf import ConversionError, OriginalCheckpointError, convert, inspect
from viscpm_hf.checkpoints.original import load_state_dict
from viscpm_hf.checkpoints.tensor_files import mapped_tensors
from viscpm_hf.conversion import comparison
from viscpm_hf.images.decoding import BadImageError, ImageLimits
from viscpm_hf.images.workers import ImageDecoder


GOLDEN = Path(__file__).parent / "golden" / "chat_a"

# For one input; an honest one takes a hundredth.
MAX_SECONDS = 10
MAX_GROWTH_BYTES = 2**30

TOKENS = (
    # of pickles
    b"\x80\x02", b"cposix\nsystem\n", b"c__builtin__\nbytearray\n", b"J\xff\xff\xff\x7f", b"\x85R",
    b"r\xff\xff\xff\x7f", b"Q", b"(", b"t", b"}", b"u", b".", b"h\x00", b"\x86", b"\x8a\xff",
    # of archives, JSON and images
    b"PK\x03\x04", b"PK\x05\x06", b"\xff" * 8, b"\0" * 8, b"1" * 400, b"[" * 2000, b'{"a":', b"null", b"-1", b"1e999",
    b"NaN", b"\xff\xd8", b"\xff\xda", b"IDAT", b"IHDR",
)  # fmt: skip


def mutate(content: bytes, chance: random.Random) -> bytes:
    """A few bytes, runs or ends are changed."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        if not data:
            break
        place, size = chance.randrange(len(data)), chance.choice((1, 2, 4, 16, 100))
        kind = chance.randrange(7)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place : place + size] = chance.randbytes(min(size, len(data) - place))
        elif kind == 2:
            del data[place : place + size]
        elif kind == 3:
            data[place:place] = data[place : place + size] * chance.choice((1, 3))
        elif kind == 4:
            data[place:place] = chance.choice(TOKENS)
        elif kind == 5:
            token = chance.choice(TOKENS)
            data[place : place + len(token)] = token
        else:
            del data[place:]
    return bytes(data)


def rebuilt(archive: bytes, chance: random.Random) -> bytes:
    """An archive that is whole, with a spoilt record, most often its pickle."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(target, "w") as written:
        names = source.namelist()
        pickle = next(name for name in names if name.endswith("data.pkl"))
        spoilt = pickle if chance.random() < 0.9 else chance.choice(names)
        for name in names:
            content = source.read(name)
            written.writestr(name, mutate(content, chance) if name == spoilt else content)
    return target.getvalue()


# ------------------------------------------------------------------------------------------------------------- targets

Target = Callable[[random.Random, Path], Iterator[bytes]]


def archive(chance: random.Random, folder: Path) -> Iterator[bytes]:
    """Files of `torch.save`."""
    whole = io.BytesIO()
    tensors = {
        "a.weight": torch.ones(3, 4),
        "b": torch.arange(5),
        "c": torch.ones(2, 3).half().t(),
        "d": torch.empty(0),
    }
    torch.save({"state_dict": tensors, "step": 3, "name": "x" * 40}, whole)
    path = folder / "model.bin"
    while True:
        spoil = rebuilt if chance.random() < 0.7 else mutate
        data = spoil(whole.getvalue(), chance)
        path.write_bytes(data)
        yield data
        try:
            for tensor in load_state_dict(path).values():
                tensor.double().sum()
        except OriginalCheckpointError as error:
            check_sentence(error)


def safetensors(chance: random.Random, folder: Path) -> Iterator[bytes]:
    whole = save({"a.weight": torch.ones(3, 4), "b": torch.arange(5), "c": torch.ones(2, 3).half()})
    path = folder / "model.safetensors"
    while True:
        data = mutate(whole[:8] + mutate(whole[8:], chance), chance)
        if chance.random() < 0.7:  # a header that has the length that it says
            length = int.from_bytes(whole[:8], "little")
            header = mutate(whole[8 : 8 + length], chance)
            data = len(header).to_bytes(8, "little") + header + whole[8 + length :]
        path.write_bytes(data)
        yield data
        try:
            for tensor in mapped_tensors(path).values():
                tensor.double().sum()
        except ConversionError as error:
            check_sentence(error)


def folder(chance: random.Random, folder: Path) -> Iterator[bytes]:
    """Original and converted folders, of which a small file is spoilt: what is told without torch is what the models
    tell."""
    original, converted = folder / "original", folder / "converted"
    shutil.copytree(GOLDEN, original, ignore=shutil.ignore_patterns("expected*", "*.png"))
    convert(original, converted)
    names = [path for path in (*original.iterdir(), *converted.iterdir()) if path.suffix in (".json", ".txt")]
    while True:
        path = chance.choice(names)
        whole = path.read_bytes()
        data = mutate(whole, chance)
        if path.suffix == ".json" and chance.random() < 0.7:
            data = odd_values(whole, chance)
        path.write_bytes(data)
        yield path.name.encode() + b"\n" + data
        try:
            found = told(path.parent)
            with only_models():
                assert told(path.parent) == found
        finally:
            path.write_bytes(whole)


def told(folder: Path) -> Any:
    try:
        return inspect(folder)
    except (OSError, ValueError) as error:
        check_sentence(error)
        return str(error)


@contextmanager
def only_models() -> Iterator[None]:
    """Nothing is known of a checkpoint but what the models of its configuration say."""
    names = ("_known_original", "_known_named", "_known_folder")
    known = {name: getattr(comparison, name) for name in names}
    try:
        for name in names:
            setattr(comparison, name, lambda *arguments: None)
        yield
    finally:
        for name in names:
            setattr(comparison, name, known[name])


ODD = (None, True, -1, 0, 10**9, 10**30, 1.5, "", "x" * 5000, "\x1b[2J", [], [[]], {}, {"a": {}}, ["a"] * 2000)


def odd_values(content: bytes, chance: random.Random) -> bytes:
    """A JSON object with another value somewhere."""
    value = json.loads(content)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return content
        key = chance.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.7:
            place = place[key]
            continue
        place[key] = chance.choice(ODD)
        return json.dumps(value).encode()


def image(chance: random.Random, folder: Path) -> Iterator[bytes]:
    """Image files, decoded as the server does."""
    picture = PIL.Image.effect_noise((40, 30), 60).convert("RGB")
    files = []
    for kind, options in (
        ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True}),
        ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_deflate"}),
    ):  # fmt: skip
        file = io.BytesIO()
        picture.save(file, kind, **options)
        files.append(file.getvalue())
    decoder = ImageDecoder(ImageLimits(max_seconds=3.0), num_workers=1)
    try:
        while True:
            data = mutate(chance.choice(files), chance)
            yield data
            try:
                decoder.decode(data).convert("RGB").getpixel((0, 0))
            except BadImageError as error:
                check_sentence(error)
    finally:
        decoder.close()


TARGETS: dict[str, Target] = {"archive": archive, "safetensors": safetensors, "folder": folder, "image": image}


# ------------------------------------------------------------------------------------------------------------- running


def check_sentence(error: Exception) -> None:
    """Errors are shown to people."""
    text = str(error)
    assert 10 < len(text) < 6000, f"no sentence: {text!r:.200}"
    assert "weights_only" not in text and "Traceback" not in text, text


@contextmanager
def bounded(seconds: int) -> Iterator[None]:
    def late(*_) -> None:
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(name: str, seconds: float, seed: int) -> int:
    """Tries a target for a time; returns how many inputs there were.

    Raises:
        AssertionError: for the first input that breaks a promise.
    """
    count, data = 0, b""
    with tempfile.TemporaryDirectory() as scratch:
        inputs = TARGETS[name](random.Random(seed), Path(scratch))
        data = next(inputs)
        end, least = time.monotonic() + seconds, memory()
        while time.monotonic() < end:
            try:
                with bounded(MAX_SECONDS):
                    following = next(inputs)
                assert memory() - least < MAX_GROWTH_BYTES, f"{(memory() - least) / 1e6:.0f} MB more"
            except Exception as error:
                kept = Path(tempfile.gettempdir()) / f"fuzz-{name}-{seed}-{count}"
                kept.write_bytes(data)
                reason = "".join(traceback.format_exception(error)[-6:])
                raise AssertionError(f"{name}, seed {seed}, input {count} (kept in {kept}): {reason}") from error
            count, data = count + 1, following
        inputs.close()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--target", choices=TARGETS)
    arguments = parser.parse_args()
    names = [arguments.target] if arguments.target else list(TARGETS)
    for name in names:
        count = run(name, arguments.seconds / len(names), arguments.seed)
        print(f"{name}: {count:,} inputs, seed {arguments.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
