"""`viscpm-hf convert`: a checkpoint in today's format, or back in the original's."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..names import QUANTIZATIONS, full_dtype_name
from .model_options import add_hub_options, add_kind_option, hub_options, one_of_both
from .words import count


if TYPE_CHECKING:
    from ..conversion.convert import ConversionResult


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        examples=(
            "viscpm-hf convert openbmb/VisCPM-Chat viscpm-chat --verify",
            "viscpm-hf convert viscpm-chat original --to original",
        ),
        help="convert an original checkpoint / 转换原始检查点",
        description="Convert an original checkpoint to a folder that transformers or diffusers load, or back. / "
        "把原始检查点转换为 transformers 或 diffusers 可直接加载的文件夹，或反向转换。",
    )
    parser.add_argument("source", metavar="SRC", help="file, folder, Hub id, or ID/file.bin / 源")
    add_kind_option(parser)
    parser.add_argument("output", metavar="OUT", help="new folder; complete or not there at all / 输出文件夹")
    parser.add_argument(
        "--to", choices=("huggingface", "original"), default="huggingface", help="format of OUT / 目标格式"
    )
    parser.add_argument("--llm-config", metavar="JSON", help="the language model's configuration / 语言模型配置")
    parser.add_argument("--vision-config", metavar="JSON", help="the vision tower's sizes / 视觉编码器配置")
    parser.add_argument("--diffusion-config", metavar="JSON", help="Paint's UNet, VAE, scheduler / 扩散模型配置")
    parser.add_argument("--vae", metavar="FILE_OR_FOLDER", help="Paint's VAE, if not in vae/ beside it / VAE")
    parser.add_argument("--vocab", metavar="TXT", help="vocab.txt, if not beside the weights / 词表")
    parser.add_argument(
        "--dtype",
        type=full_dtype_name,
        choices=("float16", "bfloat16", "float32", "keep"),
        default="keep",
        help="of OUT (keep) / 精度",
    )
    parser.add_argument(
        "--quantize", choices=tuple(QUANTIZATIONS), help="the language model's layers; no way back / 量化语言模型"
    )
    parser.add_argument(
        "--quantize-embedding", action="store_true", help="with --quantize, embedding and head too / 词嵌入与输出层"
    )
    add_writing_options(parser)
    add_hub_options(parser)
    parser.set_defaults(run=run)


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """How OUT is written."""
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (5GB) / 分片大小")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done / 仅预览")
    parser.add_argument("--resume", action="store_true", help="go on after an interruption / 断点续转")
    parser.add_argument("--verify", action="store_true", help="make all again and compare / 完成后逐一核对")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT / 覆盖已有检查点")


def run(arguments: argparse.Namespace) -> int:
    arguments.source = one_of_both(arguments.source, arguments.kind)
    if arguments.quantize is not None:
        return run_quantized(arguments)
    if arguments.quantize_embedding:
        raise ValueError("--quantize-embedding goes with --quantize: it has to be said how.")
    from ..conversion.convert import convert

    options = {name: value for name, value in vars(arguments).items() if name in OPTIONS}
    options |= hub_options(arguments, arguments.source)
    result = convert(arguments.source, arguments.output, **options, show_progress=sys.stderr.isatty())
    print(describe(result))
    broken = result.verification.nonfinite if result.verification is not None else {}
    if broken:
        names = ", ".join(list(broken)[:3]) + (", ..." if len(broken) > 3 else "")
        print(
            f"viscpm-hf: error: {sum(broken.values()):,} values of {len(broken)} tensors of the source are NaN or "
            f"infinite ({names}): {result.output} is a true copy of a broken checkpoint",
            file=sys.stderr,
        )
    return 1 if broken else 0


def run_quantized(arguments: argparse.Namespace) -> int:
    wrong = [f"--{name.replace('_', '-')}" for name in NOT_QUANTIZED if getattr(arguments, name)]
    if arguments.to != "huggingface":
        wrong.append("--to original")
    if wrong:
        raise ValueError(f"--quantize writes the whole folder at once, for loading: leave out {', '.join(wrong)}.")
    from ..conversion.quantized import convert_quantized

    names = set(OPTIONS) - {*NOT_QUANTIZED, "to"}
    options = {name: value for name, value in vars(arguments).items() if name in names}
    options |= hub_options(arguments, arguments.source)
    options["quantize_embedding"] = arguments.quantize_embedding
    print(describe(convert_quantized(arguments.source, arguments.output, arguments.quantize, **options)))
    return 0


# What a conversion to a quantised folder doesn't have.
NOT_QUANTIZED = ("dry_run", "resume", "verify")
OPTIONS = (
    "to", "llm_config", "vision_config", "diffusion_config", "vae", "vocab", "dtype", "max_shard_size", "dry_run",
    "resume", "verify", "overwrite",
)  # fmt: skip


def describe(result: ConversionResult) -> str:
    """For people."""
    from ..plain_text import size_text

    if result.already_converted:
        return "\n".join([*result.notes, "Nothing was to do, and nothing was written. / 无需转换，未写入任何文件。"])
    lines = [f"{name}  {size_text(size)}" for name, size in result.files.items()]
    total = f"{count(result.num_tensors, 'tensor')}, {size_text(result.num_bytes)}, {count(len(result.files), 'file')}"
    if result.is_dry_run:
        return "\n".join([*lines, f"would write {result.output}: {total}"])
    lines = [f"wrote {result.output}: {total}, {result.seconds:.1f} s"]
    if result.num_resumed_files:
        lines.append(f"{result.num_resumed_files} of the files were finished before")
    report = result.verification
    if report is not None:
        lines.append(f"verified: {count(report.num_tensors, 'tensor')}, bit by bit as the source has them")
        if report.loading is not None:
            lines.append("verified: loads, with the source's names and shapes")
            if report.loading.is_output_equal:
                lines.append("verified: same outputs as the source loaded directly, to the bit")
    lines.append(f"source SHA-256 {result.source_sha256}")
    return "\n".join(lines)
