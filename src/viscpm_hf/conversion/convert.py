"""Conversion of whole checkpoints: from the original's files to a folder of today's libraries, and back.

Tensors go one after another, piece by piece, from the mapped source to the new file, so memory stays small however big
the checkpoint is. What goes where is decided before the first byte is written (`planning`), the new folder appears
only when it is complete (`workspace`), and what lies beside the weights is written by `export`.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..checkpoints.errors import ConversionError
from ..checkpoints.location import MANIFEST_NAME, Location, json_object, locate
from ..checkpoints.original import ORIGINAL_WEIGHTS_NAME, PAINT
from ..checkpoints.stored_quantization import stored_quantization
from ..checkpoints.tensor_files import ArchiveWriter, SafetensorsWriter, dtype_name, named_dtype, sha256_of
from ..checkpoints.transfer import converted_pieces, one_torch_thread
from ..families.family import FAMILIES
from ..loading import placement
from ..version import __version__
from .export import export_original_folder, export_transformers_folder
from .paint import export_paint_folder, verify_loading_paint
from .plan import Checkpoint, ConversionPlan
from .planning import open_converted, open_original, plan_conversion, plan_original
from .source_files import SourceChangedError, SourceFiles
from .verify import VerificationReport, verify_files, verify_loading
from .workspace import Workspace


logger = logging.get_logger(__name__)

TO_HUGGINGFACE, TO_ORIGINAL = "huggingface", "original"
KEEP_DTYPE = "keep"
MANIFEST_FORMAT = 1
# Configurations, code and vocabulary come on top of the weights.
SPARE_BYTES = 16 * 2**20

# How far the source's checksum may be computed ahead of the conversion.
MAX_LEAD_BYTES = 2**30
WAITING_SECONDS = 0.005

ROUNDING = {
    "exact": "No value was changed: every one can be brought back exactly.",
    "one rounding": "Folded tensors were rounded once to {dtype}. Brought back, a value "
    "differs from the source by one rounding to {dtype} at most.",
    "narrowed": "Values were rounded once from {source} to {dtype}; what is brought back is "
    "within one rounding to {dtype}.",
}


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did, or with `is_dry_run` would do."""

    source: str
    output: Path
    kind: str
    files: dict[str, int]
    """Weight files and their sizes in bytes."""
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dropped: dict[str, str]
    """Tensors of the source without a place in the model, and why."""
    source_sha256: str | None = None
    seconds: float = 0.0
    num_resumed_files: int = 0
    verification: VerificationReport | None = None
    is_dry_run: bool = False
    already_converted: bool = False
    """Nothing was done: the source is a converted folder, or the output a finished conversion of it."""
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    to: str = TO_HUGGINGFACE,
    llm_config: str | os.PathLike | None = None,
    vision_config: str | os.PathLike | None = None,
    diffusion_config: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    vocab: str | os.PathLike | None = None,
    dtype: str | torch.dtype = KEEP_DTYPE,
    max_shard_size: int | str = "5GB",
    dry_run: bool = False,
    resume: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    show_progress: bool = False,
) -> ConversionResult:
    """Converts a checkpoint.

    Args:
        source: an original `.pt`/`.bin` file, a folder or a Hub id in the original's layout; with `to="original"` a
            converted folder.
        output: the new folder. It appears complete or not at all.
        to: `"huggingface"`, or `"original"` for the way back.
        llm_config, vision_config, diffusion_config: the original's JSON files, if they aren't beside the weights.
        vae: Paint's autoencoder, a file or a folder, which original files lack; if None, `vae/` beside the weights.
        vocab: `vocab.txt`, if it isn't beside the weights.
        dtype: of the new files; `"keep"` is the source's, for the way back the original's own.
        max_shard_size: bytes, or text such as `"5GB"`.
        dry_run: only plan, and check that the source is complete.
        resume: go on with a conversion that was interrupted. Finished files are used again if their checksums agree.
        verify: read everything again and compare it with the source, then load both and compare them.
        overwrite: replace a checkpoint that is there.
        revision, token, cache_dir: of the Hub.
        show_progress: a progress bar on stderr.

    Raises:
        OriginalCheckpointError: if the source can't be used.
        ConversionError: if the output can't be written there, or what was written isn't what it should be.
        OSError: if files can't be read or written, a full disk included. What is finished stays for `resume`.
    """
    if to not in (TO_HUGGINGFACE, TO_ORIGINAL):
        raise ValueError(f"to is {TO_HUGGINGFACE!r} or {TO_ORIGINAL!r}, got {to!r}.")
    wanted = parse_dtype(dtype)
    shard_bytes = parse_size(max_shard_size)
    location = locate(source, revision, token, cache_dir=cache_dir)
    if location.is_converted == (to == TO_HUGGINGFACE):
        if to == TO_ORIGINAL:
            raise ConversionError(f"{location.name} is in the original's format already.")
        return _nothing_to_do(location, location.path, f"{location.name} is a converted folder already.")
    if to == TO_ORIGINAL and (quantization := stored_quantization(location.path)) is not None:
        raise ConversionError(
            f"{location.name} is quantised to {quantization}; the original's values can't be had back from it."
        )

    manifest = json_object(location.path / MANIFEST_NAME) if to == TO_ORIGINAL else {}
    if to == TO_ORIGINAL and FAMILIES[location.kind].shares_model_type and not manifest.get("original_configs"):
        raise ConversionError(
            f"{location.name} has no {MANIFEST_NAME} of a conversion with the original's configuration, without which "
            "its format has no meaning: go back from the converted folder, or keep the original files."
        )
    checkpoint = (
        open_original(location, llm_config, vision_config, diffusion_config, vae, vocab)
        if to == TO_HUGGINGFACE
        else open_converted(location)
    )
    plan = (
        plan_conversion(checkpoint, wanted, shard_bytes)
        if to == TO_HUGGINGFACE
        else plan_original(checkpoint, wanted, manifest, ORIGINAL_WEIGHTS_NAME)
    )
    return run_plan(
        checkpoint,
        plan,
        output,
        sources=[location.path],
        to=to,
        dry_run=dry_run,
        resume=resume,
        verify=verify,
        overwrite=overwrite,
        show_progress=show_progress,
    )


def run_plan(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    output: str | os.PathLike,
    *,
    sources: list[Path],
    to: str = TO_HUGGINGFACE,
    dry_run: bool = False,
    resume: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    show_progress: bool = False,
) -> ConversionResult:
    """Writes what is planned; see [`convert`]. The output must not lie inside one of the `sources`."""
    begin = time.perf_counter()
    location = checkpoint.location
    result = ConversionResult(
        source=location.name,
        output=Path(output),
        kind=checkpoint.kind,
        files={file.path: file.nbytes for file in plan.files},
        num_tensors=sum(len(file.tensors) for file in plan.files),
        num_parameters=plan.num_parameters,
        num_bytes=plan.nbytes,
        dropped=plan.dropped,
        is_dry_run=dry_run,
    )
    fingerprint = _fingerprint(checkpoint, plan, to)
    if resume and _is_finished(Path(output), plan, fingerprint):
        return _nothing_to_do(location, Path(output), f"{output} is finished already: there is nothing to resume.")
    workspace = Workspace(output, sources, resume=resume, overwrite=overwrite or dry_run)
    if dry_run:
        return replace(result, seconds=time.perf_counter() - begin)

    conversion = _Conversion(checkpoint, plan, workspace, to, show_progress)
    with workspace.open(fingerprint):
        _check_space(workspace, plan)
        try:
            conversion.write_weights()
            conversion.check_source()
            manifest = conversion.manifest(result)
            conversion.write_rest(manifest)
            report = None
            if verify:
                report = verify_files(checkpoint.tensors, plan, workspace.path, show_progress)
                report.raise_for_differences()
                if to == TO_HUGGINGFACE:
                    check = verify_loading_paint if checkpoint.kind == PAINT else verify_loading
                    report = replace(report, loading=check(checkpoint, workspace.path))
            conversion.check_source()
            workspace.complete()
        except SourceChangedError:
            workspace.discard()
            raise
        except OSError as error:
            raise conversion.explained(error) from error
    return replace(
        result,
        source_sha256=manifest["source"]["sha256"],
        seconds=time.perf_counter() - begin,
        num_resumed_files=conversion.num_resumed_files,
        verification=report,
    )


class _Conversion:
    """The writing of one conversion."""

    def __init__(
        self, checkpoint: Checkpoint, plan: ConversionPlan, workspace: Workspace, to: str, show_progress: bool
    ):
        self.checkpoint, self.plan, self.workspace, self.to = checkpoint, plan, workspace, to
        self.show_progress = show_progress
        self.num_resumed_files = 0
        self.source_checksums: dict[str, str] = {}
        self._is_sure: dict[Path, bool] = {}
        self._source_files = SourceFiles.of(checkpoint)
        self._source_bytes: float = 0  # converted so far
        self._is_cancelled = False

    def write_weights(self) -> None:
        """Writes all files of tensors, and computes the source's checksums beside it."""
        with one_torch_thread(), ThreadPoolExecutor(1, "sha256") as thread:
            checksums = thread.submit(self._source_checksums)
            try:
                with self._progress("converting") as progress:
                    for file in self.plan.files:
                        if self.workspace.still_good(file.path):
                            self.num_resumed_files += 1
                            progress.update(file.nbytes)
                            self._source_bytes += sum(tensor.source.nbytes for tensor in file.tensors)
                        else:
                            self._write(file, progress.update)
                self._source_bytes = math.inf
                self.source_checksums = checksums.result()
            finally:
                self._is_cancelled = True

    def _write(self, file: Any, report: Callable[[int], Any]) -> None:
        path = self.workspace.path / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        writer_class = SafetensorsWriter if path.suffix == ".safetensors" else ArchiveWriter
        writer = writer_class(path, [tensor.target for tensor in file.tensors])
        try:
            for tensor in file.tensors:
                self.check_source()  # a mapped file that became shorter would end the process
                source = tensor.tensor(self.checkpoint.tensors)
                writer.write(tensor.target.name, converted_pieces(source, tensor, report))
                self._source_bytes += tensor.source.nbytes
            digest = writer.finish()
        except BaseException:
            writer.close()
            raise
        self.workspace.file_finished(file.path, path.stat().st_size, digest)

    def _source_checksums(self) -> dict[str, str]:
        checksums, begin = {}, 0
        for path in self.checkpoint.weight_files:
            checksums[self.checkpoint.source_name(path)] = sha256_of(path, functools.partial(self._wait_for, begin))
            # What was converted may have been read before, and be other contents than these.
            self._is_sure[path] = self._source_files.is_untouched(path)
            begin += path.stat().st_size
        if not self._is_cancelled:
            # What is finished was made of the file as it was then, which its size and time alone don't tell.
            known = self.workspace.recall("source_checksums")
            if known is None:
                self.workspace.remember("source_checksums", checksums)
            elif known != checksums:
                raise SourceChangedError(
                    f"The source {self.checkpoint.location.name} has other contents than when its conversion was "
                    "begun, although its size and time are the same. What there was is removed: convert again."
                )
        return checksums

    def check_source(self) -> None:
        """Raises [`SourceChangedError`] if the source changed."""
        known, name_of = self.source_checksums, self.checkpoint.source_name  # known when all is read
        self._source_files.check(
            {
                path: known[name_of(path)] if self._is_sure[path] else None
                for path in self.checkpoint.weight_files
                if known
            }
        )

    def _wait_for(self, begin: int, position: int) -> bool:
        """Lets the checksums be computed close to what is being converted, so that a source is read from the disk
        once even if it is bigger than the memory."""
        while not self._is_cancelled and begin + position > self._source_bytes + MAX_LEAD_BYTES:
            time.sleep(WAITING_SECONDS)
        return not self._is_cancelled

    def _progress(self, what: str) -> tqdm:
        return tqdm(
            total=self.plan.nbytes, desc=what, unit="B", unit_scale=True, disable=not self.show_progress, leave=False
        )

    def explained(self, error: OSError) -> OSError:
        """What went wrong, how far it came, and what to do."""
        reason = f"{error.strerror}{f': {error.filename}' if error.filename else ''}" if error.strerror else str(error)
        done = sum(known["size"] for known in self.workspace.finished.values())
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(self.workspace.output.parent).free
            reason += f"; {free / 1e9:.2f} GB are free on that disk"
        return OSError(
            f"The conversion stopped ({reason}) with {done / 1e9:.2f} of {self.plan.nbytes / 1e9:.2f} GB finished. "
            + (
                f"They are in {self.workspace.path}: go on with --resume."
                if done
                else "Nothing was left behind: the same command begins again, with or without --resume."
            )
        )

    def manifest(self, result: ConversionResult) -> dict[str, Any]:
        """`conversion.json`: every tensor, where it came from and what was done to it."""
        checkpoint, plan = self.checkpoint, self.plan
        primary, *others = checkpoint.weight_files
        names = {path: checkpoint.source_name(path) for path in checkpoint.weight_files}
        return {
            "format": MANIFEST_FORMAT,
            "tool": f"viscpm-hf {__version__}",
            "command": self._command(result),
            "direction": self.to,
            "kind": checkpoint.kind,
            "source": {
                "file": names[primary],
                "size": primary.stat().st_size,
                "sha256": self.source_checksums[names[primary]],
            },
            "other_sources": {names[path]: self.source_checksums[names[path]] for path in others},
            "rounding": _rounding(plan),
            "original_configs": checkpoint.original_configs,
            "files": dict(sorted(self.workspace.finished.items())),
            "tensors": [
                {
                    "source": tensor.source.name,
                    "target": tensor.target.name,
                    "file": file.path,
                    **checkpoint.place_of(tensor.source.name),
                    "operation": tensor.operation,
                    "source_dtype": dtype_name(tensor.source.dtype),
                    "dtype": dtype_name(tensor.target.dtype),
                    "shape": list(tensor.target.shape),
                }
                for file in plan.files
                if file.is_model
                for tensor in file.tensors
            ],
            "dropped": [
                {
                    "source": name,
                    "reason": reason,
                    "kept_in": plan.file_of_dropped(name),
                    **checkpoint.place_of(name),
                }
                for name, reason in plan.dropped.items()
            ],
        }

    def _command(self, result: ConversionResult) -> str:
        words = [*self.checkpoint.command, result.output.name]
        if self.to == TO_ORIGINAL:
            words += ["--to", TO_ORIGINAL]
        if self.plan.dtype is not None:
            words += ["--dtype", dtype_name(self.plan.dtype)]
        return shlex.join(words)

    def write_rest(self, manifest: Mapping[str, Any]) -> None:
        """Everything beside the weights."""
        folder = self.workspace.path
        self.workspace.clear_unfinished()
        if self.to == TO_ORIGINAL:
            export_original_folder(folder, self.checkpoint, manifest)
        elif self.checkpoint.kind == PAINT:
            export_paint_folder(folder, self.checkpoint, self.plan, manifest)
        else:
            export_transformers_folder(folder, self.checkpoint, self.plan, manifest)


def _nothing_to_do(location: Location, output: Path, note: str) -> ConversionResult:
    return ConversionResult(
        location.name, output, location.kind or "", {}, 0, 0, 0, {}, already_converted=True, notes=[note]
    )


def _fingerprint(checkpoint: Checkpoint, plan: ConversionPlan, to: str) -> dict[str, Any]:
    """What makes a conversion the same one."""
    return {
        "version": __version__,
        "to": to,
        "sources": [
            [checkpoint.source_name(path), path.stat().st_size, path.stat().st_mtime_ns]
            for path in checkpoint.weight_files
        ],
        "dtype": None if plan.dtype is None else dtype_name(plan.dtype),
        "files": {file.path: file.nbytes for file in plan.files},
    }


def _is_finished(output: Path, plan: ConversionPlan, fingerprint: Mapping[str, Any]) -> bool:
    """Whether a folder is what this very conversion would write: its files, and the dtypes in them."""
    manifest = json_object(output / MANIFEST_NAME)
    source = manifest.get("source") or {}
    name, size, _ = fingerprint["sources"][0]
    if (source.get("file"), source.get("size"), manifest.get("direction")) != (name, size, fingerprint["to"]):
        return False
    planned = {
        tensor.target.name: (file.path, dtype_name(tensor.target.dtype))
        for file in plan.files
        if file.is_model
        for tensor in file.tensors
    }
    entries = manifest.get("tensors") or []
    return planned == {entry.get("target"): (entry.get("file"), entry.get("dtype")) for entry in entries}


def _check_space(workspace: Workspace, plan: ConversionPlan) -> None:
    finished = sum(known["size"] for known in workspace.finished.values())
    needed = plan.nbytes - finished + SPARE_BYTES
    free = shutil.disk_usage(workspace.path).free
    # Its own half-written files are gone by now, and a finished one that turns out spoilt is written over.
    if needed > free:
        raise OSError(
            f"The disk of {workspace.output} has {free / 1e9:.2f} GB free, but the conversion needs another "
            f"{needed / 1e9:.2f} GB."
        )


def _rounding(plan: ConversionPlan) -> str:
    """How exactly the source can be had back."""
    tensors = [tensor for file in plan.files if file.is_model for tensor in file.tensors]
    narrowed = [tensor for tensor in tensors if tensor.is_narrowed]
    folded = [tensor for tensor in tensors if tensor.is_rounded]
    example = (narrowed or folded or [None])[0]
    if example is None:
        return ROUNDING["exact"]
    source, target = dtype_name(example.source.dtype), dtype_name(example.target.dtype)
    return ROUNDING["narrowed" if narrowed else "one rounding"].format(source=source, dtype=target)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for `"keep"`.

    Raises:
        ValueError: for anything but the three floating point types.
    """
    wanted = named_dtype(dtype, KEEP_DTYPE)
    return None if wanted == KEEP_DTYPE else wanted


def parse_size(size: int | str) -> int:
    """`"5GB"` -> bytes.

    Raises:
        ValueError: for what is no size, or none above zero.
    """
    num_bytes = placement.parse_size(size, "A shard size")
    if num_bytes < 1:
        raise ValueError(f"A shard size is at least a byte, got {size!r}.")
    return num_bytes
