"""lmms-eval by examples/lmms_eval_viscpm.py, on a task of a folder."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from viscpm_hf import VisCPMChat


pytestmark = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "lmms_eval_viscpm.py"
QUESTIONS = ["What colour is the shape?", "How many shapes are there?", "有几个图形？"]
TASK = """
task: shapes
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 12, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_answers_are_those_of_chat(chat_folder, pictures, run_python, tmp_path):
    from datasets import Dataset, Features, Image, Value

    data, tasks = tmp_path / "test.parquet", tmp_path / "tasks"
    columns = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    rows = [{"image": str(path), "question": q, "answer": ""} for path, q in zip(pictures, QUESTIONS, strict=False)]
    Dataset.from_list(rows, features=columns).to_parquet(data)
    tasks.mkdir()
    (tasks / "shapes.yaml").write_text(TASK.format(data=data))
    (tasks / "utils.py").write_text('def doc_to_visual(doc):\n    return [doc["image"].convert("RGB")]\n')
    run_python(
        EXAMPLE, "--model", "viscpm", "--model_args", f"pretrained={chat_folder},device=cpu", "--include_path", tasks,
        "--tasks", "shapes", "--batch_size", "2", "--output_path", tmp_path / "logs", "--log_samples",
    )  # fmt: skip
    (log,) = (tmp_path / "logs").rglob("*_samples_shapes.jsonl")
    samples = sorted(map(json.loads, log.read_text(encoding="utf-8").splitlines()), key=lambda row: row["doc_id"])
    chat = VisCPMChat(chat_folder, device="cpu")
    for sample, path, question in zip(samples, pictures, QUESTIONS, strict=False):
        assert sample["filtered_resps"] == chat.ask(path, question, mode="generate", max_new_tokens=12).answer
