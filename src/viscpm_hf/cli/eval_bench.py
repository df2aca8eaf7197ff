"""`viscpm-hf eval llava-bench`, `judge` and `score`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat import positive
from .eval_running import (
    REPORT_HELP,
    ModelRun,
    add_chat_options,
    add_run_options,
    chat_settings,
    check_place,
    counts_of,
    generation_of,
)
from .model_options import add_model_options, load_chat
from .words import count


if TYPE_CHECKING:
    from ..batch.rows import InputRow
    from ..batch.runner import RowProcessor


# --------------------------------------------------------------------------------------------------------- llava-bench


def add_llava_bench(evaluations: argparse._SubParsersAction) -> None:
    parser = evaluations.add_parser(
        "llava-bench",
        help="answer LLaVA-bench's questions / 回答 LLaVA-bench 问题",
        description="Answers the question files of LLaVA-bench, of OwlEval and of VisualCLA's translations of both. / "
        "回答 LLaVA-bench、OwlEval 及 VisualCLA 中文译本的问题文件。",
    )
    parser.add_argument("model", metavar="MODEL", help="Chat: folder, Hub id, or original file / 模型")
    parser.add_argument("--questions", metavar="JSONL", required=True, help="the questions / 问题文件")
    parser.add_argument("--images", metavar="DIR", required=True, help="their pictures / 图片目录")
    parser.add_argument("--answers", metavar="JSONL", required=True, help="where to write the answers / 回答文件")
    parser.add_argument("--model-id", help="the model's name in the answers (MODEL) / 回答中的模型名称")
    add_run_options(parser)
    add_chat_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run_llava_bench)


def run_llava_bench(arguments: argparse.Namespace) -> int:
    from ..batch.results import Results
    from ..evaluation.llava_bench import ANSWER_FIELDS, BenchRows, summarize
    from ..evaluation.questions import read_questions
    from ..evaluation.report import fingerprint

    rows = read_questions(arguments.questions, arguments.images)
    settings = chat_settings(arguments)
    name = arguments.model_id or Path(arguments.model).name
    inputs = {
        "questions": fingerprint(Path(arguments.questions)),
        "images": str(Path(arguments.images).resolve()),  # by name: a picture that can't be read may be mended
        "model_id": name,
        "seed": arguments.seed,
    }
    results = Results(arguments.answers, ANSWER_FIELDS)
    run = ModelRun(arguments, "llava-bench", "chat", results, {**settings, **inputs})

    def load() -> RowProcessor:
        images, generation = Path(arguments.images), generation_of(settings)
        return BenchRows(load_chat(arguments), images, name, settings["mode"], arguments.seed, generation)

    if not run.run(rows, load):
        return 0
    lines = run.lines(rows)
    summary = summarize(lines.values(), arguments.seed)
    for language, by_category in summary.items():
        for category, figures in by_category.items():
            share = 100 * figures["in_language"]["value"]
            print(
                f"{language} {category:<8} {figures['answers']:>4} answers, {share:.1f} % in the question's language"
            )
    return run.write_report(counts_of(lines), summary, bootstrap=arguments.seed)


# --------------------------------------------------------------------------------------------------------------- judge


def add_judge(evaluations: argparse._SubParsersAction) -> None:
    parser = evaluations.add_parser(
        "judge",
        help="let a language model judge answers / 用语言模型评判回答",
        description="Sends each answer, beside the reference's, to an OpenAI-compatible endpoint and notes the two "
        "scores. / 将回答与参考回答一起发送到兼容 OpenAI 的接口并记录分数。",
    )
    for name, what in (
        ("questions", "as for llava-bench / 问题文件"),
        ("context", 'what the pictures show: JSONL of "image", "captions" / 图片描述'),
        ("rules", "JSON {category: {prompt, role}}, or one per language {en: ..., zh: ...} / 评判规则"),
        ("reference", "the reference answers / 参考回答"),
        ("answers", "the model's answers / 模型回答"),
    ):
        parser.add_argument(f"--{name}", metavar="FILE", required=True, help=what)
    parser.add_argument("--judgements", metavar="JSONL", required=True, help="where to write the scores / 评分文件")
    parser.add_argument("--base-url", metavar="URL", required=True, help="of the endpoint, https://HOST/v1 / 接口地址")
    parser.add_argument("--judge-model", metavar="NAME", required=True, help="the judge / 评判模型")
    parser.add_argument("--api-key", metavar="KEY", help="else that of OPENAI_API_KEY / 密钥")
    parser.add_argument("--parallel", type=positive(int), default=4, help="requests at a time (4) / 并发数")
    parser.add_argument(
        "--judge-temperature", type=float, default=0.2, help="below 0: send none (0.2) / 评判温度，负数则不发送"
    )
    parser.add_argument("--judge-seed", type=int, help="sent if given / 评判随机种子")
    parser.add_argument("--judge-tokens", type=positive(int), default=1024, help="of a review (1024) / 评语最大长度")
    parser.add_argument("--attempts", type=positive(int), default=3, help="at a reply with scores (3) / 评分尝试次数")
    parser.add_argument("--max-retries", type=int, default=6, help="of a request that fails (6) / 请求重试次数")
    parser.add_argument("--timeout", type=positive(float), default=120.0, help="of a request, seconds (120) / 超时")
    budget = parser.add_argument_group("budget, earlier runs included / 预算（含之前的运行）")
    budget.add_argument("--max-requests", type=positive(int), help="requests, retries included / 最大请求数")
    budget.add_argument("--max-tokens", type=positive(int), help="tokens sent and received / 最大 token 数")
    budget.add_argument("--max-cost", type=positive(float), help="in the prices' currency / 最大费用")
    budget.add_argument("--prompt-price", type=float, help="of a million tokens sent / 每百万输入 token 价格")
    budget.add_argument("--completion-price", type=float, help="of a million received / 每百万输出 token 价格")
    parser.add_argument("--overwrite", action="store_true", help="start over / 重新开始")
    parser.add_argument("--report", metavar="JSON", help=REPORT_HELP)
    parser.set_defaults(run=run_judge)


def run_judge(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..batch.results import Results
    from ..evaluation.budget import Budget, Limits, Usage
    from ..evaluation.judging import JUDGEMENT_FIELDS, Judge, JudgeSettings, earlier_usage, judge_all
    from ..evaluation.questions import read_questions
    from ..evaluation.report import fingerprint, make_report, report_path, write_report
    from ..evaluation.rules import Rules, make_comparisons, read_answers, read_contexts
    from ..evaluation.running import unfinished

    rows = read_questions(arguments.questions)
    answers = read_answers(arguments.answers)
    paths = {
        "questions": arguments.questions,
        "contexts": arguments.context,
        "references": arguments.reference,
        "answers": arguments.answers,
    }
    comparisons = make_comparisons(
        rows,
        read_contexts(arguments.context),
        read_answers(arguments.reference),
        answers,
        Rules(arguments.rules),
        paths,
    )
    judge_settings = JudgeSettings(
        base_url=arguments.base_url,
        model=arguments.judge_model,
        temperature=None if arguments.judge_temperature < 0 else arguments.judge_temperature,
        max_tokens=arguments.judge_tokens,
        seed=arguments.judge_seed,
        attempts=arguments.attempts,
        max_retries=max(0, arguments.max_retries),
        timeout=arguments.timeout,
    )
    names = ("max_requests", "max_tokens", "max_cost", "prompt_price", "completion_price")
    limits = Limits(**{name: getattr(arguments, name) for name in names})
    files = {name: fingerprint(Path(path)) for name, path in {**paths, "rules": arguments.rules}.items()}
    results = Results(arguments.judgements, JUDGEMENT_FIELDS)
    check_place(results.output)
    report = Path(arguments.report) if arguments.report else report_path(results.output)
    if arguments.overwrite:
        results.discard()
    # What is asked must stay the same; how patiently may change from run to run.
    asked = {name: judge_settings.as_dict()[name] for name in ("model", "temperature", "max_tokens", "seed")}
    settings = {**asked, **files}
    results.check_settings(settings)

    finished = results.finished()
    before = earlier_usage(finished)
    budget = Budget(limits, sum(before.values(), Usage()))
    todo = unfinished(results, rows)
    left = {row.key for row in todo}

    def describe(row: InputRow) -> dict[str, Any]:
        model_id = answers[row.key].get("model_id", Path(arguments.answers).stem)
        return {"model_id": model_id, "category": row.values["category"], "language": row.values["language"]}

    stopped_by = None
    if todo:
        judge = Judge(judge_settings, budget, arguments.api_key)
        chosen = [comparison for row, comparison in zip(rows, comparisons, strict=True) if row.key in left]
        try:
            with results.writer(0) as writer, tqdm(total=len(todo), unit="judgement", disable=None) as progress:
                outcome = judge_all(judge, todo, chosen, writer, arguments.parallel, describe, before, progress.update)
            stopped_by = outcome.stopped_by
        except KeyboardInterrupt:
            print(f"\n{len(rows) - len(unfinished(results, rows))} of {len(rows)} are judged.", file=sys.stderr)
            raise
        finally:
            judge.close()
    finished = results.finished()
    errors = sum(place.is_error for place in finished.values())
    if len(finished) == len(rows):
        results.join(rows)
    made = make_report(
        "llava-bench judge",
        model={"name": sorted({describe(row)["model_id"] for row in rows})},
        settings={**settings, "base_url": judge_settings.as_dict()["base_url"], "attempts": arguments.attempts},
        seeds={"judge": arguments.judge_seed},
        counts={"rows": len(rows), "judged": len(finished) - errors, "errors": errors},
        results={"usage": budget.as_dict(), "stopped_by": stopped_by},
    )
    write_report(report, made)
    print(
        f"{results.output}: {len(finished) - errors} of {len(rows)} judged, {count(errors, 'error')}; "
        f"{count(budget.spent.requests, 'request')}, {count(budget.spent.tokens, 'token')}; report: {report}"
    )
    if stopped_by is not None:
        print(f"viscpm-hf: {stopped_by} Raise it and run the command again to go on.", file=sys.stderr)
    elif errors:
        print(f"viscpm-hf: {count(errors, 'judgement')} failed; the same command tries again.", file=sys.stderr)
    return 0 if len(finished) - errors == len(rows) else 1


# --------------------------------------------------------------------------------------------------------------- score


def add_score(evaluations: argparse._SubParsersAction) -> None:
    parser = evaluations.add_parser(
        "score",
        help="the table of judged answers / 汇总评分",
        description="Prints scores relative to the reference answers, in percent, per language and category, with "
        "95 % intervals. / 按语言和类别汇总相对于参考回答的百分比得分。",
    )
    parser.add_argument("judgements", metavar="JSONL", nargs="+", help="what judge wrote / 评分文件")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0) / 随机种子")
    parser.add_argument("--resamples", type=positive(int), default=2000, help="of the bootstrap (2000) / 重采样次数")
    parser.add_argument("--report", metavar="JSON", help="report (none) / 评测报告")
    parser.add_argument("--json", action="store_true", help="print the report in place of the table / 输出 JSON")
    parser.set_defaults(run=run_score)


def run_score(arguments: argparse.Namespace) -> int:
    from ..evaluation.report import make_report, write_report
    from ..evaluation.scoring import read_judgements, score, table

    judgements, failures = read_judgements(Path(path) for path in arguments.judgements)
    scores = score(judgements, arguments.seed, arguments.resamples)
    report = make_report(
        "llava-bench",
        model={"name": list(scores)},
        settings={"judgements": arguments.judgements, "resamples": arguments.resamples},
        seeds={"bootstrap": arguments.seed},
        counts={"judged": len(judgements), "errors": failures},
        results={
            model: {
                language: {category: estimate.as_dict() for category, estimate in by_category.items()}
                for language, by_category in by_language.items()
            }
            for model, by_language in scores.items()
        },
    )
    if arguments.report:
        write_report(Path(arguments.report), report)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else table(scores))
    for path, missing in failures.items():
        if missing:
            print(f"viscpm-hf: {missing} questions of {path} have no judgement and are left out.", file=sys.stderr)
    return 0
