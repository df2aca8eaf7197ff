"""The options of every command that loads a model, and the loading."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from ..names import QUANTIZATIONS, full_dtype_name
from ..tiny.embedded import EMBEDDED_NAME, KINDS, tiny


if TYPE_CHECKING:
    from ..chat.chat import VisCPMChat
    from ..paint.paint import VisCPMPaint


DTYPES = ("float32", "bfloat16", "float16")


def device_map(text: str) -> str | dict[str, Any]:
    """`auto`, `balanced` ... or a JSON object `{module: device}`."""
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text} is no JSON object: {error}") from error


def max_memory(text: str) -> dict[int | str, str]:
    """`0=8GB,cpu=20GB` -> `{0: "8GB", "cpu": "20GB"}`."""
    memory: dict[int | str, str] = {}
    for part in text.split(","):
        name, has_size, size = part.strip().partition("=")
        if not (name and has_size and size):
            raise argparse.ArgumentTypeError(f"must be as 0=8GB,cpu=20GB, got {text}")
        memory[int(name) if name.isdecimal() else name] = size
    return memory


def add_model_options(parser: argparse.ArgumentParser, paint: bool = False) -> None:
    """Adds MODEL's options (not MODEL itself) of Chat, or of Paint; [`load_chat`] and [`load_paint`] read them."""
    group = parser.add_argument_group("model / 模型")
    group.add_argument("--device", help="cuda, cuda:1, mps, cpu ... / 设备")
    group.add_argument(
        "--dtype",
        type=full_dtype_name,
        choices=DTYPES,
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)}: of the weights / 精度",
    )
    group.add_argument(
        "--quantization",
        choices=tuple(QUANTIZATIONS),
        metavar="NAME",
        help=f"{', '.join(QUANTIZATIONS)}: of the language model / 量化",
    )
    part = "unet" if paint else "vision"
    group.add_argument(
        f"--quantize-{part}",
        action="store_true",
        help=f"quantise the {part} too / 同时量化{'UNet' if paint else '视觉编码器'}",
    )
    if not paint:
        group.add_argument(
            "--quantize-embedding",
            action="store_true",
            help="quantise embedding and head too, with 4bit or 8bit on a CPU / 同时量化词嵌入与输出层",
        )
    group.add_argument(
        "--device-map", type=device_map, metavar="MAP", help="auto, balanced, or JSON {module: device} / 设备分配"
    )
    group.add_argument(
        "--max-memory", type=max_memory, metavar="LIST", help="with --device-map, 0=8GB,cpu=20GB / 各设备内存上限"
    )
    group.add_argument("--offload-folder", metavar="FOLDER", help="for weights left on the disk / 磁盘卸载目录")
    group.add_argument(
        "--fast", action="store_true", help="decode or draw faster, after a slower start / 加速，起步较慢"
    )
    group.add_argument(
        "--config", metavar="JSON", help="original file: the language model's configuration / 语言模型配置"
    )
    group.add_argument("--vocab", metavar="TXT", help="vocab.txt, if not beside the model / 词表")
    add_hub_options(group)
    group.add_argument("--image-checker", metavar="FOLDER", help="safety checker: folder or Hub id / 图片检查模型")
    if paint:
        _add_paint_options(group)
    else:
        group.add_argument(
            "--vision-config", metavar="JSON", help="original file: the vision tower's sizes / 视觉编码器配置"
        )
        group.add_argument(
            "--check-image",
            action="store_true",
            help="don't answer about unsafe images / 检查输入图片，不安全则不回答",
        )


def add_hub_options(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, what: str = "MODEL", asks: bool = True
) -> None:
    """The options that [`hub_options`] reads.

    Args:
        what: whose repository a revision is of.
        asks: whether the Hub is asked; if not, only its cache is looked at, which takes no token.
    """
    parser.add_argument("--revision", help=f"branch, tag or commit of {what}'s Hub repository / Hub 版本")
    if asks:
        parser.add_argument("--token", help="of the Hub; others see it here, but not in HF_TOKEN / Hub 令牌")
    parser.add_argument("--cache-dir", metavar="FOLDER", help="for what the Hub sends / Hub 缓存目录")


def add_kind_option(parser: argparse.ArgumentParser) -> None:
    """The option that [`one_of_both`] reads."""
    parser.add_argument("--kind", choices=KINDS, help=f"of {EMBEDDED_NAME}, which is both / 模型种类")


def one_of_both(model: str, kind: str | None) -> str:
    """`model`, or the folder of the embedded one.

    Raises:
        ValueError: for the embedded model without its kind, or another one's kind.
    """
    if model == EMBEDDED_NAME:
        if kind is None:
            raise ValueError(f"{EMBEDDED_NAME} is a chat and a paint model: say which one with --kind chat or paint.")
        return tiny(kind)
    if kind is not None:
        raise ValueError(f"--kind is of {EMBEDDED_NAME} alone: {model} says itself what it is.")
    return model


HUB_OPTIONS = ("revision", "token", "cache_dir")


def hub_options(arguments: argparse.Namespace, model: str | os.PathLike | None = None) -> dict[str, Any]:
    """Those of `HUB_OPTIONS` that were given, for `arguments.model` unless another one is.

    Raises:
        ValueError: if there are some, and the model is here.
    """
    from ..checkpoints.location import hub_arguments, is_of_the_hub

    model = arguments.model if model is None else model
    given = hub_arguments(**{name: getattr(arguments, name, None) for name in HUB_OPTIONS})
    if is_of_the_hub(model):
        return given
    other = getattr(arguments, "paint", None)  # the second model of commands that load two, see `load_painter`
    has_other = other is not None and is_of_the_hub(other)
    wrong = [name for name in given if name == "revision" or not has_other]
    if wrong:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise ValueError(f"{options} is of a Hub repository, which {model} is not: leave it out.")
    return {}


def _add_paint_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--diffusion-config",
        metavar="JSON",
        help="original file: configurations of UNet, VAE, scheduler / 扩散模型配置",
    )
    group.add_argument("--vae", metavar="PATH", help="folder or file of the VAE, if not beside the model / VAE")
    for name, what in (
        ("rank", "choose the best candidate with Chinese-CLIP / 排序"),
        ("check-prompt", "refuse unsafe prompts / 检查提示词"),
        ("check-image", "black out unsafe images / 检查图片"),
    ):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=what)
    group.add_argument("--ranker", metavar="FOLDER", help="Chinese-CLIP: folder or Hub id / 排序模型")
    group.add_argument("--prompt-checker", metavar="FOLDER", help="text classifier: folder or Hub id / 文本检查模型")
    group.add_argument(
        "--offload", choices=("none", "model", "sequential"), default="none", help="save GPU memory / 显存卸载"
    )


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("device", "dtype", "quantization", "device_map", "max_memory", "offload_folder", "fast")
    return {name: getattr(arguments, name) for name in names}


def load_chat(arguments: argparse.Namespace, **options: Any) -> VisCPMChat:
    """`VisCPMChat` of `arguments.model`; `options` are further arguments.

    Raises:
        ValueError: for options of another kind of model, or of a check that isn't made.
    """
    from ..chat.chat import VisCPMChat

    if arguments.image_checker and not arguments.check_image:
        raise ValueError(f"--image-checker {arguments.image_checker} checks nothing without --check-image.")
    options = {"image_safety_checker": arguments.check_image and (arguments.image_checker or True), **options}
    return VisCPMChat(
        arguments.model,
        arguments.config,
        vision_config_path=arguments.vision_config,
        vocab_path=arguments.vocab,
        quantize_vision=arguments.quantize_vision,
        quantize_embedding=arguments.quantize_embedding,
        **_common(arguments),
        **hub_options(arguments),
        **options,
    )


def load_paint(arguments: argparse.Namespace, **options: Any) -> VisCPMPaint:
    """`VisCPMPaint` of `arguments.model`; `options` (`scheduler`, `candidates` ...) are further arguments of it."""
    from ..paint.paint import VisCPMPaint

    return VisCPMPaint(
        arguments.model,
        image_safety_checker=arguments.check_image and (arguments.image_checker or True),
        prompt_safety_checker=arguments.check_prompt and (arguments.prompt_checker or True),
        add_ranker=arguments.rank and (arguments.ranker or True),
        config_path=arguments.config,
        diffusion_config_path=arguments.diffusion_config,
        vocab_path=arguments.vocab,
        vae=arguments.vae,
        quantize_unet=arguments.quantize_unet,
        offload=arguments.offload,
        **_common(arguments),
        **hub_options(arguments),
        **options,
    )
