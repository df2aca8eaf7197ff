"""A folder appears whole or not at all, whoever else writes there, and whenever it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from viscpm_hf import ConversionError
from viscpm_hf.conversion import workspace as workspace_module
from viscpm_hf.conversion.workspace import MARK_NAME, STATE_FORMAT, Workspace


FINGERPRINT = {"sources": [["model.bin", 5, 7]]}
FILES = {"config.json": "{}", "unet/model.safetensors": "new"}


def write(output: Path, *, resume=False, overwrite=False, files=FILES, fingerprint=FINGERPRINT) -> None:
    workspace = Workspace(output, [], resume=resume, overwrite=overwrite)
    with workspace.open(fingerprint):
        for name, content in files.items():
            if not workspace.still_good(name):
                path = workspace.path / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(content)
                workspace.file_finished(name, len(content), workspace_module.crc32_of(path))
        workspace.clear_unfinished()
        workspace.complete()


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): "link" if path.is_symlink() else path.read_text("utf-8", "replace")
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_symlink()
    }


def whole(output: Path) -> bool:
    return output.is_dir() and tree(output) == FILES


def interrupt(output: Path, *, files=1) -> None:
    """Leaves an unfinished conversion."""
    workspace = Workspace(output, [], resume=False, overwrite=False)
    with pytest.raises(KeyboardInterrupt), workspace.open(FINGERPRINT):
        for name, content in list(FILES.items())[:files]:
            (workspace.path / name).write_text(content)
            workspace.file_finished(name, len(content), workspace_module.crc32_of(workspace.path / name))
        (workspace.path / "half").write_text("written")
        raise KeyboardInterrupt


def test_what_cannot_be_resumed_begins_anew(tmp_path):
    interrupt(tmp_path / "out")
    with pytest.raises(ConversionError, match="of something else") as error:
        write(tmp_path / "out", resume=None, fingerprint={"sources": []})
    assert "--resume" not in str(error.value)
    write(tmp_path / "out", resume=None)
    assert whole(tmp_path / "out") and not (tmp_path / "out.partial").exists()


# ------------------------------------------------------------------------------------------------- what isn't ours


def folder_of_theirs(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine")
    (path / "config.json").write_text("{}")


THEIRS = {
    "a folder": folder_of_theirs,
    "a text": lambda path: path.write_text("mine"),
    "a list": lambda path: path.write_text('["mine"]'),
    "an object": lambda path: path.write_text('{"finished": {}, "fingerprint": {}}'),
    "deep": lambda path: path.write_text("[" * 100_000),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True}])
@pytest.mark.parametrize("suffix", [".partial", ".partial.json", ".partial.lock", ".replaced", ".partial.new"])
@pytest.mark.parametrize("what", THEIRS)
def test_what_others_made_stays(tmp_path, what, suffix, options):
    output = tmp_path / "out"
    if options.get("overwrite"):
        output.mkdir()
        (output / "config.json").write_text("{}")
    THEIRS[what](tmp_path / f"out{suffix}")
    before = {name: content for name, content in tree(tmp_path).items() if not name.startswith("out/")}
    try:
        write(output, **options)
    except (ConversionError, OSError) as error:
        assert f"out{suffix}" in str(error)
        assert not options.get("overwrite") or tree(output) == {"config.json": "{}"}
    else:
        assert whole(output)
    after = tree(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert {name for name in after if not name.startswith("out/")} == set(before)


def test_a_folder_put_in_the_place_of_ours_stays(tmp_path):
    interrupt(tmp_path / "out")
    shutil.rmtree(tmp_path / "out.partial")
    folder_of_theirs(tmp_path / "out.partial")
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ConversionError, match="in the way"):
            write(tmp_path / "out", **options)
    assert (tmp_path / "out.partial" / "thesis.txt").is_file()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
STATE = st.fixed_dictionaries(
    {},
    optional={
        "format": st.just(STATE_FORMAT) | JSON,
        "id": st.sampled_from(["../../x", "0123456789abcdef"]) | JSON,
        "fingerprint": st.just(FINGERPRINT) | JSON,
        "finished": st.dictionaries(st.sampled_from([*FILES, "../x"]), st.just({"size": 2, "crc32": "0"}) | JSON)
        | JSON,
        "is_complete": JSON,
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40) | (JSON | STATE).map(lambda value: json.dumps(value).encode()))
def test_any_list_of_an_unfinished_conversion(tmp_path_factory, content):
    """Spoilt, forged or somebody's: a sentence, and everything stays; or a whole folder."""
    folder = tmp_path_factory.mktemp("spoilt")
    interrupt(folder / "out")
    state = folder / "out.partial.json"
    state.write_bytes(content)
    (folder / "x").write_text("keep")
    before = tree(folder)
    try:
        write(folder / "out", resume=True)
    except ConversionError as error:
        assert str(error).isprintable()
        assert tree(folder) == before
    else:
        assert whole(folder / "out")
    assert (folder / "x").read_text() == "keep"
    shutil.rmtree(folder)


# --------------------------------------------------------------------------------------------------- two at once


def test_the_second_is_told_who_writes(tmp_path):
    output = tmp_path / "out"
    workspace = Workspace(output, [], resume=False, overwrite=False)
    with pytest.raises(KeyboardInterrupt), workspace.open(FINGERPRINT):
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(
                ConversionError, match=rf"out is being written by process {os.getpid()} on .* \(since 20"
            ):
                write(output, **options)
        raise KeyboardInterrupt
    write(output)
    assert whole(output) and list(tmp_path.iterdir()) == [output]


HOLD = """
import sys
from pathlib import Path
from viscpm_hf.conversion.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1]), Path("out")):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_lock_that_a_kill_has_left_is_none(tmp_path):
    lock = tmp_path / "out.partial.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(ConversionError, match=f"process {holder.pid} on"):
        write(tmp_path / "out")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdin.close(), holder.stdout.close()
    assert lock.is_file()
    write(tmp_path / "out")
    assert whole(tmp_path / "out") and not lock.exists()


def test_many_at_once_leave_a_whole_folder(tmp_path):
    """Whoever doesn't get it is refused; nobody who reports success is wrong."""
    for number in range(20):
        output, done, strange = tmp_path / str(number) / "out", [], []
        start = threading.Barrier(4)

        def run(options, output=output, done=done, strange=strange, start=start):
            start.wait()
            try:
                write(output, **options)
                done.append(whole(output) or options)
            except ConversionError:
                pass
            except Exception as error:  # noqa: BLE001, whatever it is
                strange.append(error)

        ways = ({}, {"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True})
        threads = [threading.Thread(target=run, args=(options,)) for options in ways]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not strange and done and whole(output)
        assert os.listdir(output.parent) == ["out"]


# -------------------------------------------------------------------------------------------------- kills anywhere


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_killed_at_any_step(tmp_path, options):
    """Of a checkpoint that is replaced there is a whole copy at any moment, and --resume ends what was begun."""
    step = 0
    while True:
        folder = tmp_path / str(step)
        output = folder / "out"
        folder.mkdir()
        if options:
            output.mkdir()
            (output / "config.json").write_text("old")
        child = os.fork()
        if child == 0:  # pragma: no cover
            try:
                die_at_step(step)
                write(output, **options)
            finally:
                os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            assert whole(output)
            break
        copies = [tree(path) for path in folder.iterdir() if path.is_dir()]
        assert not options or FILES in copies or {"config.json": "old"} in copies
        if not whole(output):
            write(output, resume=True, **options)
        assert whole(output)
        step += 1
    assert step > 10


def die_at_step(step: int) -> None:
    """Ends this process before the step-th change to the disk."""
    count = iter(range(10**6))

    def dying(function):
        def change(*arguments, **keywords):
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return change

    for owner, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (os, "fsync")):
        setattr(owner, name, dying(getattr(owner, name)))
    Path.write_text = dying(Path.write_text)


def test_half_written_files_are_gone_before_room_is_looked_for(tmp_path):
    interrupt(tmp_path / "out")
    workspace = Workspace(tmp_path / "out", [], resume=True, overwrite=False)
    with pytest.raises(KeyboardInterrupt), workspace.open(FINGERPRINT):
        assert sorted(os.listdir(workspace.path)) == [MARK_NAME, "config.json"]
        raise KeyboardInterrupt
