"""`viscpm-hf export`: a model as programs for other runtimes."""

from __future__ import annotations

import argparse
import re

from .chat import positive
from .model_options import add_hub_options, hub_options


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        examples=(
            "viscpm-hf export openbmb/MiniCPM-V-2 OUT --quantization int4",
            "viscpm-hf export openbmb/MiniCPM-V-2 OUT --view 448x448 --view 336x588 --verify",
        ),
        help="export MiniCPM-V for phones / 导出 MiniCPM-V 到手机",
        description="Export MiniCPM-V as programs for ExecuTorch: tower and resampler, embedding, language model with "
        "its cache. / 将 MiniCPM-V 导出为 ExecuTorch 程序：视觉编码器与重采样器、词嵌入、带缓存的语言模型。",
    )
    parser.add_argument("model", metavar="MODEL", help="MiniCPM-V 1.0 or 2.0: folder or Hub id / 模型")
    parser.add_argument("output", metavar="OUT", help="new folder; complete or not there at all / 输出文件夹")
    parser.add_argument("--format", choices=("executorch",), default="executorch", help="of OUT (executorch) / 格式")
    parser.add_argument(
        "--quantization", choices=("int8", "int4"), help="of the weights, through torchao; else float32 / 量化"
    )
    parser.add_argument(
        "--view",
        type=size,
        action="append",
        default=[],
        metavar="HxW",
        help="a size of view that the tower takes; repeatable (448x448) / 视图尺寸，可重复",
    )
    parser.add_argument(
        "--context", type=positive(int), default=1024, help="tokens of prompt and answer (1024) / 上下文长度"
    )
    parser.add_argument(
        "--verify", action="store_true", help="run OUT here and compare with torch / 在本机运行并与 torch 比较"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT / 覆盖已有文件夹")
    add_hub_options(parser)
    parser.set_defaults(run=run)


def size(text: str) -> tuple[int, int]:
    """`448x336` -> (448, 336), height and width."""
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be height and width as 448x336, got {text}")
    return int(match[1]), int(match[2])


def run(arguments: argparse.Namespace) -> int:
    from transformers import AutoConfig

    from ..chat.sibling_chat import SiblingChat
    from ..conversion.executorch import check_export, export_executorch
    from ..families.systems import title_of
    from ..modeling.configuration_vision_resampler import MiniCPMVConfig
    from ..plain_text import size_text
    from ..tiny.embedded import resolve_model

    source = resolve_model(arguments.model, "chat")
    hub = hub_options(arguments)
    config = AutoConfig.from_pretrained(source, **hub)
    if not isinstance(config, MiniCPMVConfig):
        raise ValueError(f"export takes MiniCPM-V 1.0 and 2.0, and {arguments.model} is {title_of(config)}.")
    check_export(config, arguments.quantization, arguments.view, arguments.context)
    chat = SiblingChat(source, device="cpu", dtype="float32", **hub)
    export = export_executorch(
        chat.model,
        chat.processor,
        arguments.output,
        quantization=arguments.quantization,
        views=arguments.view,
        context=arguments.context,
        verify=arguments.verify,
        overwrite=arguments.overwrite,
    )
    for part, num_bytes in export.sizes.items():
        print(f"{size_text(num_bytes):>10}  {part}.pte")
    if export.logit_difference is not None:
        print(f"ran here: logits up to {export.largest_logit:.3g}, at most {export.logit_difference:.2g} from torch's")
    print(f"wrote {export.folder}")
    return 0
