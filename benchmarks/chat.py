"""Speed of VisCPM-Chat on this machine: prompt, decoding, tokenizer, import.

    python benchmarks/chat.py                    # 12 layers, width 1024: some minutes, 3 GB
    python benchmarks/chat.py --quick            # does it run at all: seconds
    python benchmarks/chat.py --vocab vocab.txt  # with the released vocabulary

Weights are random and seeded, nothing is downloaded. What every figure means is in `README.md` beside this file; the
last line printed is one JSON object with all of them. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from PIL import Image

import viscpm_hf
from viscpm_hf import CpmBeeTokenizer, VisCPMChatConfig, VisCPMChatForConditionalGeneration
from viscpm_hf.modeling.beam_search_cpm_bee import ReferenceDecodingConfig
from viscpm_hf.modeling.image_processing_viscpm import VisCPMImageProcessor
from viscpm_hf.modeling.processing_viscpm_chat import VisCPMChatProcessor


VOCABULARY_SIZE = 86_583  # of the released vocabulary
LONGEST_WORD = 32
QUESTION = "图片里有什么？请详细描述画面中的人物、动作、颜色和背景，并说明你是怎么看出来的。"

# What the tokenizer is measured on, a line being three clauses of one language.
CLAUSES = (
    (
        "图片中有一只橘黄色的猫趴在窗台上，", "阳光从左边照进来，在木地板上留下长长的影子。", "背景是一座安静的小城，",
        "街道两旁种满了梧桐树，行人不多。", "这张照片大约拍摄于2023年的秋天，", "穿红色外套的小女孩在放风筝。",
        "餐桌上摆着三碗热气腾腾的牛肉面和一盘青菜，", "远处的山被云雾遮住了一半，看不清楚山顶。",
    ),
    (
        "The picture shows an orange cat lying on the windowsill, ", "with sunlight coming in from the left. ",
        "In the background there is a quiet little town, ", "whose streets are lined with plane trees. ",
        "It was probably taken in the autumn of 2023, ", "while a girl in a red coat is flying a kite in the park. ",
        "Three bowls of steaming noodles stand on the table, ", "and the mountains are half hidden by the clouds. ",
    ),
)  # fmt: skip

# Targets, as (figure, limit, whether the limit is a maximum).
TARGETS = (
    ("prompt_ratio_3_beams", 1.15, True),
    ("share_of_floor_1_beam_32", 0.80, False),
    ("share_of_floor_1_beam_512", 0.80, False),
    ("step_ratio_3_beams_32", 1.30, True),
    ("step_ratio_3_beams_512", 1.30, True),
    ("tokenizer_ratio_to_greedy", 5.0, False),
    ("tokenizer_megabyte_ratio", 1.5, True),
    ("tokenizer_load_seconds", 0.5, True),
    ("tokenizer_load_ratio_to_plain", 1.0, True),
    ("tokenizer_decode_ratio_to_plain", 1.0, False),
    ("import_seconds", 0.3, True),
)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


# ---------------------------------------------------------------------------------------------------- model and inputs


def synthetic_vocabulary(seed: int) -> list[str]:
    """A vocabulary of the released one's size and rough make-up: specials, characters, Chinese and Latin words."""
    draw = random.Random(seed)
    specials = "<pad> <unk> <mask> <sep> </n> </_> <s> </s> <root> <ans> <option> <eod>".split()
    latin = [chr(code) for code in range(0x21, 0x7F)]
    chinese = [chr(code) for code in range(0x4E00, 0x9FA6)] + list("，。？！：；（）、")
    words = dict.fromkeys([*specials, *latin, *chinese])
    while len(words) < VOCABULARY_SIZE:
        if draw.random() < 0.6:
            # Common characters form most words.
            word = "".join(
                chinese[int(draw.random() ** 3 * len(chinese))] for _ in range(draw.choice((2, 2, 2, 3, 4)))
            )
        else:
            word = "".join(draw.choices("etaoinsrhldcumfpgwybvkxjqz", range(26, 0, -1), k=draw.randint(2, 10)))
        words[word] = None
    return list(words)


def sample_text(num_characters: int, seed: int) -> str:
    """Lines of ordinary Chinese and English in random order."""
    draw = random.Random(seed)
    lines: list[str] = []
    total = 0
    while total < num_characters:
        lines.append("".join(draw.sample(draw.choice(CLAUSES), 3)))
        total += len(lines[-1]) + 1
    return "\n".join(lines)[:num_characters]


def build(
    args: argparse.Namespace, vocab_file: Path
) -> tuple[VisCPMChatForConditionalGeneration, VisCPMChatProcessor]:
    tokenizer = CpmBeeTokenizer(vocab_file)
    torch.manual_seed(args.seed)
    config = VisCPMChatConfig(
        text_config={
            "vocab_size": tokenizer.num_words,
            "hidden_size": args.hidden_size,
            "intermediate_size": args.hidden_size * 5 // 2,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.hidden_size // 128,
            "head_dim": 128,
        },
        vision_config={  # no larger than the released one
            "hidden_size": (vision_size := min(args.hidden_size // 2, 1024)),
            "intermediate_size": 4 * vision_size,
            "num_hidden_layers": min(args.layers, 24),
            "num_attention_heads": max(1, vision_size // 64),
        },
    )
    model = VisCPMChatForConditionalGeneration(config).eval()
    # A random model ends its answer at random. With this row zero (the head is tied to it) the logit of `</s>` is 0,
    # far below the best of 86,583 random ones, so every answer runs to its limit.
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.eos_token_id] = 0.0
    processor = VisCPMChatProcessor(VisCPMImageProcessor(), tokenizer, num_query_tokens=config.num_query_tokens)
    return model, processor


def prompt_inputs(
    model, processor: VisCPMChatProcessor, question: str = QUESTION
) -> tuple[dict[str, Any], list[list[int]]]:
    """The tensors of one question about one image, and the segment of its answer."""
    image = Image.effect_noise((224, 224), 80).convert("RGB")
    document = {"image": "<image>", "context": "", "question": question, "<ans>": ""}
    parsed = processor.encode_prompt(processor.parse_prompt(document))
    inputs = processor.tokenizer.collate([parsed.prompt()], return_tensors="pt").data
    inputs["pixel_values"] = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    return inputs, [[slot.segment_id for slot in parsed.answer_slots]]


# -------------------------------------------------------------------------------------------------------------- memory


class Bandwidth:
    """How fast this machine reads the weights that a decoding step reads, by the fastest of several plain kernels."""

    def __init__(self, model: VisCPMChatForConditionalGeneration):
        language_model = model.language_model()
        self.weights = [parameter.detach() for parameter in language_model.layers.parameters()]
        self.weights.append(model.lm_head.weight.detach())
        self.num_bytes = sum(weight.numel() * weight.element_size() for weight in self.weights)
        matrices = [weight for weight in self.weights if weight.ndim == 2]
        vectors = {weight.shape[1]: torch.ones(weight.shape[1]) for weight in matrices}
        self.kernels: dict[str, Callable[[], Any]] = {
            "sum": lambda: [weight.sum() for weight in self.weights],
            "max": lambda: [weight.amax() for weight in self.weights],
            "matrix-vector": lambda: [torch.mv(weight, vectors[weight.shape[1]]) for weight in matrices],
        }
        self.seconds_by_kernel: dict[str, list[float]] = {name: [] for name in self.kernels}

    def measure(self, repeats: int) -> float:
        """Seconds to read all weights once: the best kernel's median now."""
        now = []
        for name, kernel in self.kernels.items():
            times = [seconds(kernel) for _ in range(repeats)]
            self.seconds_by_kernel[name] += times
            now.append(median(times))
        return min(now)


# ------------------------------------------------------------------------------------------------------------ decoding


class Clock:
    """Times of a decoding's steps: a `progress` callback of the reference search, or a streamer of `generate`."""

    def __init__(self):
        self.begin = time.perf_counter()
        self.times: list[float] = []
        self._prompt_seen = False

    def __call__(self, step: int) -> None:
        self.times.append(time.perf_counter())

    def put(self, tokens: torch.Tensor) -> None:
        if self._prompt_seen:
            self(0)
        self._prompt_seen = True  # a streamer is handed the prompt first

    def end(self) -> None:
        pass

    @property
    def first_token_seconds(self) -> float:
        return self.times[0] - self.begin

    @property
    def seconds_per_step(self) -> float:
        """Mean over all steps after the first: growth of the cache is in it, and whatever else the machine did."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def search(model, inputs, segments, num_beams: int, length: int) -> Clock:
    decoding = ReferenceDecodingConfig(num_beams=num_beams, max_new_tokens=length)
    clock = Clock()
    (answer,) = model.reference_search(inputs, segments, decoding, progress=clock)
    if answer.num_tokens < length:
        raise RuntimeError(f"The answer ended after {answer.num_tokens} of {length} tokens.")
    return clock


def generate(model, inputs, length: int, **kwargs) -> Clock:
    clock = Clock()
    model.generate(**inputs, max_new_tokens=length, do_sample=False, streamer=clock, **kwargs)
    if len(clock.times) != length:
        raise RuntimeError(f"The answer ended after {len(clock.times)} of {length} tokens.")
    return clock


def measure_prompt(model, inputs, segments, repeats: int) -> dict[str, float]:
    """Medians of the vision tower alone, and of everything up to the first token at 1 and 3 beams."""
    samples: dict[str, list[float]] = {"vision_seconds": [], "prompt_seconds_1_beam": [], "prompt_seconds_3_beams": []}
    with torch.no_grad():
        for _ in range(repeats):
            samples["vision_seconds"].append(seconds(lambda: model.get_image_features(inputs["pixel_values"])))
            samples["prompt_seconds_1_beam"].append(search(model, inputs, segments, 1, 1).first_token_seconds)
            samples["prompt_seconds_3_beams"].append(search(model, inputs, segments, 3, 1).first_token_seconds)
    pairs = zip(samples["prompt_seconds_3_beams"], samples["prompt_seconds_1_beam"], strict=True)
    figures = {name: median(values) for name, values in samples.items()}
    return figures | {"prompt_ratio_3_beams": median(three / one for three, one in pairs)}


def measure_decoding(
    model, inputs, segments, bandwidth: Bandwidth, lengths: list[int], rounds: int
) -> Iterator[dict[str, Any]]:
    """One row for every way to decode and every length.

    A round runs all ways in turn with a reading of the bandwidth between them, so that a ratio compares neighbours.
    """
    token_ids = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"])
    encoded = {**token_ids, "mm_encoder_outputs": {"image": features}}
    ways: dict[str, tuple[int, Callable[[int], Clock]]] = {
        "reference, 1 beam": (1, lambda length: search(model, encoded, segments, 1, length)),
        "reference, 3 beams": (3, lambda length: search(model, encoded, segments, 3, length)),
        "generate, greedy": (1, lambda length: generate(model, inputs, length)),
        "generate, greedy, static cache": (
            1,
            lambda length: generate(model, inputs, length, cache_implementation="static", disable_compile=True),
        ),
    }
    config = model.config.text_config
    bytes_per_place = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * 4
    prompt_length = inputs["input_ids"].shape[1]

    def bytes_per_token(num_beams: int, length: int) -> int:
        """Weights, and the keys and values that a step reads on average over the answer."""
        return bandwidth.num_bytes + bytes_per_place * (prompt_length + num_beams * length // 2)

    for length in lengths:
        samples: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for index in range(rounds):
            log(f"decoding, {length} tokens, round {index + 1} of {rounds}")
            floor = bandwidth.measure(3)
            for way, (num_beams, run) in ways.items():
                clock = run(length)
                after = bandwidth.measure(3)
                beside, floor = min(floor, after), after
                step = median(clock.steps)
                samples[way].append(
                    {
                        "ms_per_step": 1e3 * step,
                        "mean_ms_per_step": 1e3 * clock.seconds_per_step,
                        "last_steps_ms": 1e3 * median(clock.steps[-32:]),
                        "floor_ms": 1e3 * beside,
                        "share_of_floor": beside / step,
                        "share_of_bandwidth": beside / step * bytes_per_token(num_beams, length) / bandwidth.num_bytes,
                    }
                )
                # `ways` begins with one beam, which has its sample of this round already.
                samples[way][-1]["ratio_to_1_beam"] = 1e3 * step / samples["reference, 1 beam"][-1]["ms_per_step"]
        for way, (num_beams, _) in ways.items():
            figures = {name: median(sample[name] for sample in samples[way]) for name in samples[way][0]}
            num_bytes = bytes_per_token(num_beams, length)
            yield {
                "way": way,
                "num_beams": num_beams,
                "length": length,
                "tokens_per_second": 1e3 / figures["ms_per_step"],
                **figures,
                "bytes_per_token": num_bytes,
                "gigabytes_per_second": num_bytes / figures["ms_per_step"] / 1e6,
            }


# ------------------------------------------------------------------------------------------------ tokenizer and import


def greedy(text: str, words: set[str]) -> list[str]:
    """The plain greedy matcher: for every position the longest candidate first."""
    pieces, begin, unknown = [], 0, 0
    while begin < len(text):
        for end in range(min(len(text), begin + LONGEST_WORD), begin, -1):
            if text[begin:end] in words:
                if unknown < begin:
                    pieces.append(text[unknown:begin])
                pieces.append(text[begin:end])
                begin = unknown = end
                break
        else:
            begin += 1
    if unknown < len(text):
        pieces.append(text[unknown:])
    return pieces


class PlainTokenizer:
    """Loading and decoding as a plain-Python tokenizer does them: one dictionary each way."""

    def __init__(self, vocab_file: Path):
        self.ids: dict[str, int] = {}
        with open(vocab_file, encoding="utf-8") as file:
            for line in file:
                self.ids[line.removesuffix("\n")] = len(self.ids)
        for name, token in (("</n>", "\n"), ("</_>", " ")):
            self.ids[token] = self.ids.pop(name)
        self.tokens = {index: token for token, index in self.ids.items()}

    def decode(self, token_ids: list[int]) -> str:
        pieces = []
        for index in token_ids:
            if index in self.tokens:
                pieces.append(self.tokens[index])
            else:
                pieces.append("<unk>")
        return "".join(pieces)


def measure_detokenizing(tokenizer: CpmBeeTokenizer, vocab_file: Path, text: str, repeats: int) -> dict[str, float]:
    """Loading and decoding beside a plain-Python tokenizer, in turn."""
    plain = PlainTokenizer(vocab_file)
    token_ids = tokenizer.encode_text(tokenizer.escape(text))[0]
    if plain.decode(token_ids) != tokenizer.decode(token_ids, skip_special_tokens=True):
        raise RuntimeError("The tokenizer and the plain one decode differently.")
    loads = [
        (seconds(lambda: PlainTokenizer(vocab_file)), seconds(lambda: CpmBeeTokenizer(vocab_file)))
        for _ in range(repeats)
    ]
    decodings = [
        (
            seconds(lambda: plain.decode(token_ids)),
            seconds(lambda: tokenizer.decode(token_ids, skip_special_tokens=True)),
        )
        for _ in range(3 * repeats)
    ]
    return {
        "tokenizer_vocabulary_seconds": median(ours for _, ours in loads),
        "tokenizer_load_ratio_to_plain": median(ours / theirs for theirs, ours in loads),
        "tokenizer_decode_million_tokens_per_second": len(token_ids) / median(ours for _, ours in decodings) / 1e6,
        "tokenizer_decode_ratio_to_plain": median(theirs / ours for theirs, ours in decodings),
    }


def measure_tokenizer(vocab_file: Path, num_characters: int, repeats: int) -> dict[str, float]:
    load_seconds = min(seconds(lambda: CpmBeeTokenizer(vocab_file).matcher) for _ in range(repeats))
    tokenizer = CpmBeeTokenizer(vocab_file)
    text = sample_text(num_characters, seed=1)
    lines = text.split("\n")
    split = tokenizer.matcher.split
    words = set(tokenizer.vocab) - set(tokenizer.all_special_tokens)
    if [split(line) for line in lines] != [greedy(line, words) for line in lines]:
        raise RuntimeError("The tokenizer and the plain greedy matcher disagree.")
    ratios, rates = [], []
    for _ in range(repeats):
        plain = seconds(lambda: [greedy(line, words) for line in lines])
        ours = seconds(lambda: [split(line) for line in lines])
        ratios.append(plain / ours)
        rates.append(num_characters / ours / 1e6)
    # Linear in the text: a character of one string of a megabyte costs what it costs in a short one.
    long = (text * (1_000_000 // len(text) + 1))[:1_000_000]
    short = long[:100_000]
    long_seconds = min(seconds(lambda: split(long)) for _ in range(repeats))
    short_seconds = min(seconds(lambda: split(short)) for _ in range(10 * repeats))
    return {
        "tokenizer_load_seconds": load_seconds,
        "tokenizer_million_characters_per_second": median(rates),
        "tokenizer_ratio_to_greedy": median(ratios),
        "tokenizer_megabyte_seconds": long_seconds,
        "tokenizer_megabyte_ratio": long_seconds / len(long) / (short_seconds / len(short)),
        **measure_detokenizing(tokenizer, vocab_file, text, repeats),
    }


def measure_import(repeats: int) -> dict[str, float]:
    """What `import viscpm_hf` costs, and what it adds to the first use of transformers' Auto classes, in fresh
    processes."""
    auto_classes = (
        "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, "
        "AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer"
    )

    def once(statement: str) -> float:
        code = f"import time; begin = time.perf_counter(); {statement}; print(time.perf_counter() - begin)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return float(result.stdout)

    with_ours = f"import viscpm_hf; {auto_classes}"
    once(with_ours)  # page cache
    samples = [(once("import viscpm_hf"), once(auto_classes), once(with_ours)) for _ in range(repeats)]
    ours, transformers_seconds, both = (min(values) for values in zip(*samples, strict=True))
    return {
        "import_seconds": ours,
        "import_transformers_seconds": transformers_seconds,
        "first_use_seconds": both - transformers_seconds,
    }


# -------------------------------------------------------------------------------------------------------------- report


def device_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_gigabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['device']}, {report['threads']} threads, torch {report['versions']['torch']}")
    print(
        f"Prompt of {report['prompt_tokens']} tokens: vision {report['vision_seconds']:.3f} s; to the first token "
        f"{report['prompt_seconds_1_beam']:.3f} s at 1 beam, {report['prompt_seconds_3_beams']:.3f} s at 3 beams"
    )
    print(
        f"Reading the language model's {report['weight_bytes_per_token'] / 1e6:.0f} MB once: "
        f"{report['floor_ms']:.1f} ms at best, {report['bandwidth_gigabytes_per_second']:.1f} GB/s\n"
    )
    columns = ("length", "ms/step", "tok/s", "mean", "last", "floor", "of it", "share", "GB/s")
    print(f"{'decoding':32}" + "".join(f"{column:>8}" for column in columns))
    for row in report["decoding"]:
        print(
            f"{row['way']:32}{row['length']:>8}{row['ms_per_step']:>8.1f}{row['tokens_per_second']:>8.1f}"
            f"{row['mean_ms_per_step']:>8.1f}{row['last_steps_ms']:>8.1f}{row['floor_ms']:>8.1f}"
            f"{row['share_of_floor']:>8.0%}{row['share_of_bandwidth']:>8.0%}{row['gigabytes_per_second']:>8.1f}"
        )
    print(f"\n{'target':34}{'measured':>10}{'limit':>10}")
    for name, limit, is_maximum in TARGETS:
        if name in report:
            kept = report[name] <= limit if is_maximum else report[name] >= limit
            bound = f"{'<=' if is_maximum else '>='} {limit:.2f}"
            print(f"{name:34}{report[name]:>10.3f}{bound:>10}  {'kept' if kept else 'MISSED'}")
    print(f"\nPeak memory {report['peak_gigabytes']:.2f} GB\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run on a tiny model, one round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12, help="of the language model and of the vision tower")
    parser.add_argument("--hidden-size", type=int, default=1024, help="a multiple of 128; the tower's is half of it")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 512], help="answer lengths")
    parser.add_argument("--no-decoding", action="store_true", help="prompt, tokenizer and import alone")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of every decoding")
    parser.add_argument("--vocab", type=Path, help="vocab.txt; a synthetic one of the same size unless given")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.quick:
        args.layers, args.hidden_size, args.lengths, args.rounds = 2, 128, [8, 32], 1
    repeats = 1 if args.quick else 5
    torch.set_num_threads(args.threads)

    report: dict[str, Any] = {
        "benchmark": "chat",
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "device": device_name(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "dtype": "float32",
        "versions": {
            "viscpm_hf": viscpm_hf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "model": {"layers": args.layers, "hidden_size": args.hidden_size, "seed": args.seed},
        "vocabulary": str(args.vocab) if args.vocab else "synthetic",
    }
    with tempfile.TemporaryDirectory() as folder:
        vocab_file = args.vocab
        if vocab_file is None:
            vocab_file = Path(folder) / "vocab.txt"
            vocab_file.write_text("".join(f"{word}\n" for word in synthetic_vocabulary(args.seed)), encoding="utf-8")
        log("building the model")
        model, processor = build(args, vocab_file)
        inputs, segments = prompt_inputs(model, processor)
        bandwidth = Bandwidth(model)
        report |= {"prompt_tokens": inputs["input_ids"].shape[1], "weight_bytes_per_token": bandwidth.num_bytes}
        search(model, inputs, segments, 3, 4)  # first touch of everything
        log("prompt")
        report |= measure_prompt(model, inputs, segments, repeats)
        lengths = [] if args.no_decoding else args.lengths
        bandwidth.measure(repeats)
        report["decoding"] = list(measure_decoding(model, inputs, segments, bandwidth, lengths, args.rounds))
        for row in report["decoding"]:
            if row["way"] == "reference, 1 beam":
                report[f"share_of_bandwidth_1_beam_{row['length']}"] = row["share_of_bandwidth"]
                report[f"share_of_floor_1_beam_{row['length']}"] = row["share_of_floor"]
            elif row["way"] == "reference, 3 beams":
                report[f"step_ratio_3_beams_{row['length']}"] = row["ratio_to_1_beam"]
        best = min(min(times) for times in bandwidth.seconds_by_kernel.values())
        report["floor_ms"] = 1e3 * best
        report["floor_ms_by_kernel"] = {
            name: 1e3 * median(times) for name, times in bandwidth.seconds_by_kernel.items()
        }
        report["bandwidth_gigabytes_per_second"] = bandwidth.num_bytes / best / 1e9
        report["peak_gigabytes"] = peak_gigabytes()
        log("tokenizer")
        report |= measure_tokenizer(vocab_file, 20_000 if args.quick else 200_000, repeats)
    log("import")
    report |= measure_import(1 if args.quick else 7)
    print_table(report)
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
