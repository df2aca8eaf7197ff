"""What `batch` and the evaluations of models share: their options, and runs that go on where they ended."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat import GENERATION_OPTIONS, add_decoding_options, generation_options, positive
from .model_options import hub_options, load_paint
from .words import count


if TYPE_CHECKING:
    from ..batch.processing import PaintRows
    from ..batch.results import Results
    from ..batch.rows import InputRow
    from ..batch.runner import RowProcessor

BATCH_SIZE = 8
REPORT_HELP = "report (beside the output, .report.json) / 评测报告"


# ------------------------------------------------------------------------------------------------------------- options


def add_process_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=positive(int), default=BATCH_SIZE, help=f"rows at once ({BATCH_SIZE}) / 批大小"
    )
    parser.add_argument(
        "--num-processes", type=positive(int), default=1, help="processes, one a GPU (1) / 进程数，每个 GPU 一个"
    )
    parser.add_argument("--overwrite", action="store_true", help="start over / 重新开始")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    add_process_options(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first row, the others' follow (0) / 首行的随机种子，其余依次加一"
    )
    parser.add_argument("--report", metavar="JSON", help=REPORT_HELP)


def add_chat_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("Chat / 对话")
    group.add_argument("--mode", choices=("reference", "generate"), help="decoding (reference) / 解码方式")
    add_decoding_options(group)
    return group


def add_paint_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("Paint / 绘画")
    group.add_argument("--steps", type=positive(int), help="denoising steps (50) / 采样步数")
    group.add_argument("--guidance", type=float, help="weight of the prompt (7.5) / 引导系数")
    group.add_argument("--size", type=positive(int), help="height and width in pixels (512) / 图片边长")
    group.add_argument("--scheduler", metavar="NAME", help="ddpm, dpm++, euler, ddim, unipc, ... / 采样器")
    group.add_argument("--candidates", type=positive(int), help="images drawn per prompt, with ranking (4) / 候选数")
    return group


def chat_mode(arguments: argparse.Namespace) -> str:
    return arguments.mode or ("reference" if arguments.top_p is None else "generate")


def chat_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    mode = chat_mode(arguments)
    return {
        "mode": mode,
        **generation_options(arguments, mode),
        **_model_settings(arguments),
        "quantize_vision": arguments.quantize_vision,
        "quantize_embedding": arguments.quantize_embedding,
        "vision_config": _identity(arguments.vision_config),
        **({"check_image": _identity(arguments.image_checker) or True} if arguments.check_image else {}),
    }


def generation_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The decoding options among the settings."""
    return {name: settings[name] for name in (*GENERATION_OPTIONS, "do_sample") if name in settings}


def paint_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "guidance", "size", "scheduler", "candidates", "rank", "check_prompt", "check_image")
    return {
        **{name: getattr(arguments, name) for name in names},
        **_model_settings(arguments),
        "quantize_unet": arguments.quantize_unet,
        "diffusion_config": _identity(arguments.diffusion_config),
        "vae": _identity(arguments.vae),
        "ranker": _identity(arguments.ranker),
        "prompt_checker": _identity(arguments.prompt_checker),
        "image_checker": _identity(arguments.image_checker),
    }


def _model_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        "batch_size": arguments.batch_size,
        "config": _identity(arguments.config),
        "vocab": _identity(arguments.vocab),
    }


def _identity(path: str | None) -> str | None:
    """A file or folder by its contents, wherever it is; a Hub id by its name."""
    from ..evaluation.report import fingerprint

    return fingerprint(Path(path)) if path is not None and Path(path).exists() else path


def paint_rows(rows_class: type[PaintRows], arguments: argparse.Namespace, folder: Path) -> PaintRows:
    """The model, and what it makes of rows in a folder."""
    options = {"scheduler": arguments.scheduler, "candidates": arguments.candidates}
    painter = load_paint(arguments, **{name: value for name, value in options.items() if value is not None})
    painter.pipeline.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    return rows_class(painter, folder, arguments.seed, paint_options(arguments))


def paint_options(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "image_size": arguments.size,
    }
    return {name: value for name, value in given.items() if value is not None}


# ----------------------------------------------------------------------------------------------------------- every run


class ModelRun:
    """Rows through a model, in one process or several, and the report at the end.

    Args:
        settings: what makes the results what they are, the model aside: a run that goes on must have the same.
    """

    def __init__(
        self, arguments: argparse.Namespace, name: str, kind: str, results: Results, settings: dict[str, Any]
    ):
        from ..evaluation.report import known_by, report_path

        check_place(results.output)
        self.arguments, self.name, self.kind, self.results = arguments, name, kind, results
        hub_options(arguments)  # what belongs to no model is told before anything is read
        model = known_by(arguments.model, kind)
        self.settings = json.loads(json.dumps({"model": model, **settings}))
        if arguments.revision is not None:
            self.settings["revision"] = arguments.revision
        self.report = Path(arguments.report) if arguments.report else report_path(results.output)

    def run(self, rows: Sequence[InputRow], load: Callable[[], RowProcessor]) -> bool:
        """Returns whether this process is the one to go on with the results, which are complete then."""
        from ..batch.launching import Share, launch
        from ..evaluation.running import run_rows

        arguments, share = self.arguments, Share.of_this_process()
        if share.is_first:
            if arguments.overwrite:
                self.results.discard()
                self.report.unlink(missing_ok=True)
            self.results.check_settings(self.settings)
        share.wait_for_others()
        try:
            if share.processes == 1 and arguments.num_processes > 1:
                launch(arguments.argv, arguments.num_processes)
                return False
            arguments.device = share.device(arguments.device)
            run_rows(self.results, rows, load, arguments.batch_size, share)
            share.wait_for_others()
        except KeyboardInterrupt:
            if share.is_first:
                done = len(self.results.finished())
                print(f"\n{done} of {len(rows)} rows are finished; the same command goes on.", file=sys.stderr)
            raise
        if share.is_first:
            self.results.join(rows)
        return share.is_first

    def write_report(self, counts: dict[str, Any], results: dict[str, Any], **seeds: Any) -> int:
        """Writes the report, and returns the exit status: whether every row has a result."""
        from ..evaluation.report import make_report, model_identity, write_report

        report = make_report(
            self.name,
            # The commit is known only now.
            model=model_identity(
                self.arguments.model,
                self.kind,
                revision=self.arguments.revision,
                cache_dir=self.arguments.cache_dir,
            ),
            settings=self.settings,
            seeds={"first_row": self.arguments.seed, **seeds},
            counts=counts,
            results=results,
        )
        write_report(self.report, report)
        print(
            f"{self.results.output}: {count(counts['rows'], 'row')}, {count(counts['errors'], 'error')}; "
            f"report: {self.report}"
        )
        if counts["errors"]:
            print(
                f"viscpm-hf: {count(counts['errors'], 'row')} failed; the same command tries again.", file=sys.stderr
            )
        return 1 if counts["errors"] else 0

    def lines(self, rows: Sequence[InputRow]) -> dict[str, dict[str, Any]]:
        """The results by the rows' keys."""
        from ..evaluation.running import read_results

        return {row.key: line for row, line in zip(rows, read_results(self.results.output), strict=True)}


def check_place(output: Path) -> None:
    """Raises `OSError` for a file that can't be written, before minutes of loading."""
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder, not a file to write.")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {output.parent} to write {output.name} to.")
    if not os.access(output.absolute().parent, os.W_OK):
        raise PermissionError(f"{output} can't be written: no permission.")


def counts_of(lines: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {"rows": len(lines), "errors": sum("error" in line for line in lines.values())}
