"""The parser of `torch.save`'s files: it reads what torch reads, and refuses at once what costs or asks for more."""

import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from viscpm_hf import OriginalCheckpointError
from viscpm_hf.checkpoints import archive, headers
from viscpm_hf.checkpoints.original import load_state_dict


DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    tensor = torch.randn(shape).mul(3).to(draw(st.sampled_from(DTYPES)))
    if tensor.ndim > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    if tensor.ndim and draw(st.booleans()):
        tensor = tensor[1:]  # at an offset of its storage
    if tensor.is_floating_point() and draw(st.booleans()):
        tensor = torch.nn.Parameter(tensor)
    return tensor


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    state_dict=st.dictionaries(st.text(min_size=1, max_size=20), tensors(), min_size=1, max_size=6),
    is_nested=st.booleans(),
    protocol=st.sampled_from([2, 3, 4, 5]),
)
def test_as_torch_reads_it(tmp_path, state_dict, is_nested, protocol):
    path = tmp_path / "model.bin"
    whole = {"state_dict": state_dict, "step": 3, "lr": 1e-4, "names": ["a", ("b", None, True)]}
    torch.save(whole if is_nested else state_dict, path, pickle_protocol=protocol)
    read = load_state_dict(path)
    assert list(read) == list(state_dict)
    for name, tensor in state_dict.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)


def test_as_a_module_is_saved(tmp_path):
    """An OrderedDict with torch's notes about versions."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "model.pt")
    read = load_state_dict(tmp_path / "model.pt")
    assert all(torch.equal(read[name], tensor) for name, tensor in module.state_dict().items())


def test_tensors_with_attributes(tmp_path):
    """As OmniLMM-12B's; the attributes are left out."""
    tensor, parameter = torch.arange(6.0).view(2, 3).T, torch.nn.Parameter(torch.ones(2))
    tensor.is_parallel = parameter.is_parallel = True
    torch.save({"a": tensor, "b": parameter}, tmp_path / "model.bin")
    read = load_state_dict(tmp_path / "model.bin")
    assert torch.equal(read["a"], tensor) and torch.equal(read["b"], parameter)
    assert not hasattr(read["a"], "is_parallel")


def test_writing_to_a_mapped_tensor_leaves_the_file(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    load_state_dict(tmp_path / "model.pt")["a"].zero_()
    assert (tmp_path / "model.pt").read_bytes() == before


# ------------------------------------------------------------------------------------------------------------- attacks


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def pickled(*instructions: bytes) -> bytes:
    return b"\x80\x02" + b"".join(instructions) + b"."


GIGABYTES = b"J\xff\xff\xff\x7f"  # the number 2**31 - 1
PICKLES = {
    "bytearray": pickled(b"c__builtin__\nbytearray\n", GIGABYTES, b"\x85R"),
    "bytearray of protocol 4": pickle.dumps(Calls(bytearray, 2**31 - 1), protocol=4),
    "bytes by a codec": pickle.dumps(b"x" * 100, protocol=2),
    "getattr": pickle.dumps(Calls(getattr, {}, "clear"), protocol=4),
    "system": pickled(b"cposix\nsystem\nX\x04\0\0\0true\x85R"),
    "system in place of a tensor": pickled(
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nctorch\nTensor\nX\x04\0\0\0true\x85}tR"
    ),
    "a tensor of another class": pickled(
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\ncevil\nTensor\n)}tR"
    ),
    "instance": pickled(b"(cos\nsystem\nX\x04\0\0\0trueo"),
    "import in letters": b"cposix\nsystem\n(S'true'\ntR.",
    "place in the memo": pickled(b"}r\xff\xff\xff\x7f"),
    "many marks": pickled(b"(" * 1_000_001),
    "deep": pickled(b")" + b"\x85" * 150_000),
    "a name whose hash has no end": pickled(b"}Nq\0" + b"h\0\x86q\0" * 60 + b"Ns"),
    "numbers of a megabyte": pickled(b"\x8b", struct.pack("<i", 10**6), b"\x7f" * 10**6),
    "a tensor of no numbers": pickled(b"}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n", b"NK\0)", b")tRs"),
    "storage of another kind": pickled(b"(X\7\0\0\0storagectorch\nQInt8Storage\nX\1\0\0\x000X\3\0\0\0cpuK\1tQ"),
    "nothing": b"",
    "no end": b"\x80\x02}",
    "too much of it": pickled(b"NN"),
}


def write_archive(path: Path, content: bytes, records=()) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in (("a/data.pkl", content), *records):
            file.writestr(name, data)


@pytest.mark.parametrize("what", PICKLES)
def test_costly_and_foreign_pickles(tmp_path, what):
    path = tmp_path / "model.bin"
    write_archive(path, PICKLES[what])
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(OriginalCheckpointError) as error:
        load_state_dict(path)
    assert time.process_time() - begin < 10
    assert tracemalloc.get_traced_memory()[1] < 300e6
    tracemalloc.stop()
    assert "weights_only" not in str(error.value) and str(error.value).isprintable()


def test_many_records_and_many_tensors(tmp_path, monkeypatch):
    path = tmp_path / "model.bin"
    torch.save({f"t{number}": torch.empty(0) for number in range(300)}, path)
    assert len(load_state_dict(path)) == 300
    with monkeypatch.context() as patch:
        patch.setattr(archive, "MAX_TENSORS", 299)
        with pytest.raises(OriginalCheckpointError, match="300 tensors"):
            load_state_dict(path)
        patch.setattr(archive, "MAX_TENSORS", 100)
        with pytest.raises(OriginalCheckpointError, match="3[0-9]{2} records"):
            load_state_dict(path)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "MAX_DIRECTORY_BYTES", 1000)
        with pytest.raises(OriginalCheckpointError, match="list of its records takes [0-9,]+ bytes"):
            load_state_dict(path)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "MAX_INSTRUCTIONS", 1000)
        with pytest.raises(OriginalCheckpointError, match="more than 1,000 instructions"):
            load_state_dict(path)


def test_names_in_errors_are_plain_and_short(tmp_path):
    path = tmp_path / "model.bin"
    write_archive(path, pickled(b"c\x1b[2J" + b"x" * 5000 + b"\nsystem\n)R"))
    with pytest.raises(OriginalCheckpointError) as error:
        load_state_dict(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 600
    torch.save({"\x1b]0;" + "y" * 900: 3}, path)
    with pytest.raises(OriginalCheckpointError) as error:
        load_state_dict(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_two_lists_and_two_records_of_one_name(tmp_path):
    """Readers disagree which of them counts."""
    path = tmp_path / "model.bin"
    for names in (("b/data.pkl",), ("a/data/0", "a/data/0")):
        with pytest.warns(UserWarning) if len(names) == 2 else pytest.MonkeyPatch.context():
            write_archive(path, pickled(b"}"), [(name, b"") for name in names])
        with pytest.raises(OriginalCheckpointError, match="2 lists of tensors|two records"):
            load_state_dict(path)


def test_a_pointer_of_git_lfs(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(headers.LFS_POINTER + b"v1\noid sha256:abc\nsize 123\n")
    with pytest.raises(OriginalCheckpointError, match=r"model.bin.*git lfs pull"):
        load_state_dict(path)
