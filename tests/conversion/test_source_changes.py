"""A source that changes while it is converted: noticed, and nothing of it is left."""

import json
import os
import shutil
from pathlib import Path

import pytest

import viscpm_hf.conversion.convert as convert_module
from viscpm_hf import ConversionError, convert, inspect
from viscpm_hf.conversion.source_files import SourceChangedError


WEIGHTS = "pytorch_model.bin"


def spoil(path: Path) -> None:
    """Other values, same size."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(64))


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def spoil_with_old_time(path: Path) -> None:
    before = path.stat()
    spoil(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    before = path.stat()
    shutil.copyfile(path, path.with_name("other"))
    os.utime(path.with_name("other"), ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(path.with_name("other"), path)


CHANGES = {
    "other values": (spoil, WEIGHTS, "written anew"),
    "more bytes": (grow, WEIGHTS, "bytes and has"),
    "other values with the old time": (spoil_with_old_time, WEIGHTS, "contents differ"),
    "another file": (replace, WEIGHTS, "written anew"),
    "gone": (Path.unlink, WEIGHTS, "can't be read any more"),
    "another vocabulary": (grow, "vocab.txt", "bytes and has"),
    "another configuration": (grow, "cpm-bee.json", "bytes and has"),
}


def convert_changing(monkeypatch, source: Path, output: Path, change, *, at: str = "write_rest", **options):
    """Converts, and changes the source when all weights are written, before or after what `at` does."""
    stock = getattr(convert_module._Conversion, at)

    def changing(self, *arguments):
        if at == "write_rest":
            stock(self, *arguments)
            change()
            return None
        change()
        return stock(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(convert_module._Conversion, at, changing)
        return convert(source, output, **options)


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(small_original, tmp_path, monkeypatch, what):
    change, name, message = CHANGES[what]
    for at in ("write_rest", "check_source"):
        shutil.copytree(small_original, tmp_path / at)
        with pytest.raises(SourceChangedError, match=message):
            convert_changing(
                monkeypatch, tmp_path / at, tmp_path / "out", lambda at=at: change(tmp_path / at / name), at=at
            )
        assert not list(tmp_path.glob("out*"))


def test_a_change_in_the_middle_ends_at_the_next_tensor(small_original, tmp_path, monkeypatch):
    written = []
    stock = convert_module.converted_pieces

    def changing(source, tensor, report):
        written.append(tensor)
        if len(written) == 3:
            grow(small_original / WEIGHTS)
        return stock(source, tensor, report)

    monkeypatch.setattr(convert_module, "converted_pieces", changing)
    with pytest.raises(ConversionError, match="changed while it was converted"):
        convert(small_original, tmp_path / "out")
    assert len(written) == 3 and sorted(path.name for path in tmp_path.iterdir()) == ["original"]


def test_mode_and_links_are_no_change(small_original, tmp_path, monkeypatch):
    def touch_nothing():
        (small_original / WEIGHTS).chmod(0o600)
        os.link(small_original / WEIGHTS, small_original.parent / "link")

    convert_changing(monkeypatch, small_original, tmp_path / "out", touch_nothing)
    assert inspect(tmp_path / "out").is_complete


def test_a_source_that_changed_between_two_runs_is_not_gone_on_with(small_original, tmp_path, monkeypatch):
    """Size and time may be the same; what is finished was made of other bytes."""

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_changing(monkeypatch, small_original, tmp_path / "out", stop, at="manifest", max_shard_size="200KB")
    assert (tmp_path / "out.partial").is_dir()
    spoil_with_old_time(small_original / WEIGHTS)
    with pytest.raises(ConversionError, match="other contents than when its conversion was begun"):
        convert(small_original, tmp_path / "out", max_shard_size="200KB", resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]


def test_room_for_what_is_left_is_enough(small_original, tmp_path, monkeypatch):
    """On a disk that is nearly full a half-written file makes room for itself."""

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_changing(monkeypatch, small_original, tmp_path / "out", stop, at="manifest", max_shard_size="200KB")
    partial = tmp_path / "out.partial"
    last = sorted(partial.glob("model-*"))[-1]
    state = tmp_path / "out.partial.json"
    content = json.loads(state.read_text())
    content["finished"].pop(last.name)
    state.write_text(json.dumps(content))
    last.rename(partial / "half-written.safetensors")
    capacity = sum(path.stat().st_size for path in partial.iterdir())

    def usage(path):
        used = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        return shutil._ntuple_diskusage(capacity, used, capacity - used)

    monkeypatch.setattr(convert_module, "SPARE_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert convert(small_original, tmp_path / "out", max_shard_size="200KB", resume=True).num_resumed_files >= 1


def test_a_change_before_the_checksum_is_noticed(small_original, tmp_path, monkeypatch):
    """Checksums are computed beside the conversion; on a busy machine, after what they belong to was read."""
    stock = convert_module.sha256_of

    def late(path, *arguments):
        if path == small_original / WEIGHTS:
            spoil_with_old_time(path)
        return stock(path, *arguments)

    monkeypatch.setattr(convert_module, "sha256_of", late)
    with pytest.raises(SourceChangedError, match="contents differ"):
        convert(small_original, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
