"""Broken and hostile files: one clear sentence, nothing run, nothing left behind."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from viscpm_hf import ConversionError, OriginalCheckpointError, convert, inspect
from viscpm_hf.checkpoints import archive
from viscpm_hf.checkpoints.headers import weight_files
from viscpm_hf.checkpoints.original import load_state_dict
from viscpm_hf.cli import main


WEIGHTS = "pytorch_model.bin"


def state_dict_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / WEIGHTS, weights_only=True)


def is_refused(folder: Path, match: str, output: Path) -> None:
    """Neither converted nor inspected nor loaded, and nothing is written."""
    for attempt in (
        lambda: convert(folder, output),
        lambda: inspect(folder),
        lambda: load_state_dict(folder / WEIGHTS),
    ):
        with pytest.raises(OriginalCheckpointError, match=match):
            attempt()
    assert not output.exists() and not output.with_name(output.name + ".partial").exists()


def rewrite_archive(path: Path, change) -> None:
    """Writes the records of an archive again; `change(name, content)` gives the new content and compression."""
    with zipfile.ZipFile(path) as source:
        records = [(record.filename, source.read(record)) for record in source.infolist()]
    with zipfile.ZipFile(path, "w") as target:
        for name, content in records:
            content, compression = change(name, content)
            target.writestr(zipfile.ZipInfo(name), content, compress_type=compression)


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


# -------------------------------------------------------------------------------------------------- original files


def test_pickle_that_would_run_code(small_original, tmp_path):
    mark = tmp_path / "it ran"
    torch.save({**state_dict_of(small_original), "query": Attack(mark)}, small_original / WEIGHTS)
    is_refused(small_original, "refused.*could run code.*system", tmp_path / "out")
    (small_original / WEIGHTS).write_bytes(pickle.dumps(Attack(mark)))
    is_refused(small_original, "no readable PyTorch file|refused", tmp_path / "out")
    assert not mark.exists()


def test_zip_bomb(small_original, tmp_path):
    def bomb(name, content):
        return (bytes(50_000_000), zipfile.ZIP_DEFLATED) if name.endswith("data/0") else (content, zipfile.ZIP_STORED)

    rewrite_archive(small_original / WEIGHTS, bomb)
    assert (small_original / WEIGHTS).stat().st_size < 2_000_000
    is_refused(small_original, "unpacks to 50,000,000, but torch.save never compresses", tmp_path / "out")


def test_absurd_list_of_tensors(small_original, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_PICKLE_BYTES", 1000)
    is_refused(small_original, "list of its tensors takes [0-9,]+ bytes", tmp_path / "out")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated(small_original, tmp_path, share):
    path = small_original / WEIGHTS
    size = path.stat().st_size
    os.truncate(path, int(size * share))
    is_refused(small_original, f"{int(size * share):,} bytes.*cut short", tmp_path / "out")


def test_not_a_checkpoint_at_all(small_original, tmp_path):
    (small_original / WEIGHTS).write_text("<html>404 Not Found</html>" * 100)
    is_refused(small_original, "no readable PyTorch file", tmp_path / "out")


def change_pickle(path: Path, old: bytes, new: bytes) -> None:
    def change(name, content):
        if name.endswith("data.pkl"):
            assert old in content
            content = content.replace(old, new, 1)
        return content, zipfile.ZIP_STORED

    rewrite_archive(path, change)


def test_tensor_that_claims_more_than_its_record(small_original, tmp_path):
    """`query` of 8 × 32 values becomes 8 × 64, twice what its record holds, and so would show what lies behind it."""
    path = small_original / WEIGHTS
    with zipfile.ZipFile(path) as file:
        content = file.read("pytorch_model/data.pkl")
    begin = content.index(b"query")
    head, tail = content[:begin], content[begin:]
    changed = head + tail.replace(b"M\x00\x01t", b"M\x00\x02t", 1).replace(b"K\x08K ", b"K\x08K@", 1)
    change_pickle(path, content, changed)
    is_refused(small_original, "refused", tmp_path / "out")


def test_tensor_that_repeats_one_value(small_original, tmp_path):
    """A shape of terabytes over four bytes: no memory is spent on finding out."""
    state_dict = state_dict_of(small_original)
    state_dict["query"] = torch.zeros(1).expand(2**20, 2**20)
    torch.save(state_dict, small_original / WEIGHTS)
    is_refused(small_original, r"query has the shape \(1048576, 1048576\).*holds 4 bytes", tmp_path / "out")


def test_tensors_that_share_their_bytes(small_original, tmp_path):
    state_dict = state_dict_of(small_original)
    state_dict["mapping.0.bias"] = state_dict["mapping.2.bias"][:]
    torch.save(state_dict, small_original / WEIGHTS)
    is_refused(small_original, r"mapping\.\d\.bias and mapping\.\d\.bias share", tmp_path / "out")


def test_shapes_of_another_model(small_original, tmp_path):
    state_dict = state_dict_of(small_original)
    state_dict["mapping.2.bias"] = torch.zeros(7)
    torch.save(state_dict, small_original / WEIGHTS)
    with pytest.raises(OriginalCheckpointError, match=r"mapping.2.bias is \(7,\) instead of \(48,\)"):
        convert(small_original, tmp_path / "out")
    assert inspect(small_original).problems == ["mapping.2.bias is (7,) instead of (48,)"]


def test_missing_and_unknown_tensors(small_original, tmp_path):
    state_dict = state_dict_of(small_original)
    del state_dict["query"]
    torch.save({**state_dict, "strange.weight": torch.ones(2)}, small_original / WEIGHTS)
    with pytest.raises(OriginalCheckpointError, match="1 tensors missing.*1 unknown tensors.*strange"):
        convert(small_original, tmp_path / "out")


def test_no_state_dict(small_original, tmp_path):
    torch.save([torch.ones(2)], small_original / WEIGHTS)
    is_refused(small_original, "list, not a dict", tmp_path / "out")
    torch.save({"step": 3}, small_original / WEIGHTS)
    is_refused(small_original, "1 of 1 entries are none", tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_reported(small_original, tmp_path, value, capsys):
    state_dict = state_dict_of(small_original)
    state_dict["mapping.2.weight"][3, 4] = value
    torch.save(state_dict, small_original / WEIGHTS)
    result = convert(small_original, tmp_path / "out", verify=True)
    assert result.verification.nonfinite == {"mapping.2.weight": 1} and not result.verification.differing
    code = main(["convert", str(small_original), str(tmp_path / "again"), "--verify"])
    assert code == 1 and "NaN or infinite (mapping.2.weight)" in capsys.readouterr().err


def test_overflow_is_an_error(small_original, tmp_path):
    state_dict = state_dict_of(small_original)
    state_dict["mapping.2.weight"][3, 4] = 1e6
    torch.save(state_dict, small_original / WEIGHTS)
    with pytest.raises(ConversionError, match="1 values of 1 tensors are too big"):
        convert(small_original, tmp_path / "out", dtype="float16", verify=True)
    assert not (tmp_path / "out").exists()


def test_wrong_vocabulary_or_none(small_original, tmp_path):
    vocab = small_original / "vocab.txt"
    vocab.write_text(vocab.read_text("utf-8") + "\none more", "utf-8")
    with pytest.raises(OriginalCheckpointError, match="298 tokens, but the model 297"):
        convert(small_original, tmp_path / "out")
    vocab.unlink()
    with pytest.raises(FileNotFoundError, match="--vocab"):
        convert(small_original, tmp_path / "out")


# ------------------------------------------------------------------------------------------------- converted folders


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_index_that_leaves_the_folder(own_converted, tmp_path):
    secret = tmp_path / "secret.safetensors"
    save_file({"x": torch.ones(1)}, secret)
    index = own_converted / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name in ("../secret.safetensors", str(secret), "sub/../../secret.safetensors", "..", "", 7):
        content["weight_map"]["lm_head.weight"] = name
        index.write_text(json.dumps(content))
        with pytest.raises(ConversionError, match="refused|no index"):
            weight_files(own_converted, "model")
    with pytest.raises(ConversionError, match="refused|no index"):
        convert(own_converted, tmp_path / "back", to="original")
    assert inspect(own_converted).problems


def test_symbolic_link_out_of_the_folder(own_converted, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.move(shards(own_converted)[0], outside)
    (own_converted / shards_name(own_converted)).symlink_to(outside)
    with pytest.raises(ConversionError, match="link to .*outside.safetensors, outside its folder"):
        convert(own_converted, tmp_path / "back", to="original")


def shards_name(folder: Path) -> str:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return sorted(set(index["weight_map"].values()))[0]


def test_links_of_the_hub_cache_are_fine(converted, tmp_path):
    """There every file is a link into the repository's blobs."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0" / "", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for number, file in enumerate(sorted(converted.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "back", to="original")
    assert inspect(snapshot).is_complete


@pytest.mark.parametrize("length", [2**63, 10**12, 10**8])
def test_absurd_header(own_converted, tmp_path, length):
    path = shards(own_converted)[0]
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(ConversionError, match="header claims [0-9,]+ bytes"):
        convert(own_converted, tmp_path / "back", to="original")
    assert "header claims" in inspect(own_converted).problems[0]


def test_spoilt_header(own_converted, tmp_path):
    path = shards(own_converted)[0]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__" and len(header[key]["shape"]) == 2)
    for change in (
        {"shape": [1, 1]},
        {"data_offsets": [0, 4]},
        {"data_offsets": [0]},
        {"dtype": "F7"},
        {"shape": "x"},
    ):
        spoilt = json.dumps({**header, name: {**header[name], **change}}).encode()
        path.write_bytes(struct.pack("<Q", len(spoilt)) + spoilt + content[8 + length :])
        with pytest.raises(ConversionError, match="damaged|makes no sense"):
            convert(own_converted, tmp_path / "back", to="original")
    path.write_bytes(content[:8] + b"[" * length + content[8 + length :])
    with pytest.raises(ConversionError, match="makes no sense"):
        convert(own_converted, tmp_path / "back", to="original")


def test_converted_folder_cut_short_or_incomplete(own_converted, tmp_path):
    first, second = shards(own_converted)[:2]
    os.truncate(first, first.stat().st_size - 4)
    with pytest.raises(ConversionError, match="cut short"):
        convert(own_converted, tmp_path / "back", to="original")
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {second.name}, one of the"):
        weight_files(own_converted, "model")
    assert not inspect(own_converted).is_complete


def test_converted_folder_with_surplus_tensors(own_converted, tmp_path):
    path = shards(own_converted)[0]
    save_file({**load_file(path), "lora.weight": torch.ones(2)}, path)
    with pytest.raises(ConversionError, match="1 tensors that the original doesn't know .lora.weight"):
        convert(own_converted, tmp_path / "back", to="original")


# -------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("name", ["带空格 的 文件夹", "a b'c\"d", "ünïcödé"])
def test_strange_paths(small_original, tmp_path, name):
    source, output = tmp_path / name / "源", tmp_path / name / "输出 out"
    source.parent.mkdir()
    small_original.rename(source)
    convert(source, output, verify=True)
    assert inspect(output).is_complete
    convert(output, tmp_path / name / "back", to="original")


def test_path_that_is_no_utf8(small_original, tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    output = Path(os.fsdecode(folder)) / "out"
    convert(small_original, output)
    assert inspect(output).num_parameters


# Root reads and writes everything by two capabilities, which are lost at the next exec. Anybody else hasn't got them.
WITHOUT_PRIVILEGES = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH) if os.geteuid() == 0 else ():
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "viscpm_hf.cli", *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform != "linux" and os.geteuid() == 0, reason="only on Linux can root do without rights")
@pytest.mark.parametrize("what", ["source", "weights", "output"])
def test_without_permission(small_original, tmp_path, what):
    target = tmp_path / "target"
    target.mkdir()
    {"source": small_original, "weights": small_original / WEIGHTS, "output": target}[what].chmod(
        0o555 if what == "output" else 0
    )
    command = [sys.executable, "-c", WITHOUT_PRIVILEGES, "convert", str(small_original), str(target / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    small_original.chmod(0o755)
    assert done.returncode == 1 and "ermission denied" in done.stderr and "Traceback" not in done.stderr
    assert not (target / "out").exists()
