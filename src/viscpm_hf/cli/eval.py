"""`viscpm-hf eval`: LLaVA-bench with a judge, FID and CLIP score, and the demo world's test sets."""

from __future__ import annotations

import argparse

from .eval_bench import add_judge, add_llava_bench, add_score
from .eval_models import add_fid, add_shapes


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "eval",
        examples=(
            "viscpm-hf eval shapes chat viscpm-tiny --output answers.jsonl",
            "viscpm-hf eval llava-bench --help",
        ),
        help="measure a model / 评测模型",
        description="Measure a model. Each evaluation writes its results line by line, goes on where it ended when "
        "run again, and ends with a JSON report. / "
        "评测模型：结果逐行写入，中断后重新运行即可继续，最后写出 JSON 报告。",
    )
    evaluations = parser.add_subparsers(dest="evaluation", metavar="EVALUATION", required=True)
    add_llava_bench(evaluations)
    add_judge(evaluations)
    add_score(evaluations)
    add_fid(evaluations)
    add_shapes(evaluations)
