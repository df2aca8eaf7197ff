"""lm-evaluation-harness on CPM-Bee, as its `hf` model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

ROWS = [
    {"question": "What colour is the circle?", "choices": ["red", "blue"], "gold": 0},
    {"question": "圆形是什么颜色？", "choices": ["红色", "蓝色"], "gold": 1},
    {"question": "How many shapes are there?", "choices": ["two", "three"], "gold": 0},
]
TASKS = {
    "shapes_choice": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "shapes_text": """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def evaluate(bee_folder, tmp_path_factory):
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    for name, task in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        text = f'task: {name}\n{source}doc_to_text: "{{{{question}}}}"\n{task}'
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")

    def run(batch_size: int) -> dict:
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(bee_folder), "dtype": "float32", "device": "cpu"},
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(folder)),
            batch_size=batch_size,
            log_samples=True,
        )["samples"]

    return run


@pytest.mark.parametrize("batch_size", [1, 4])
def test_choices_and_texts(evaluate, bee_folder, batch_size):
    samples = evaluate(batch_size)
    model = AutoModelForCausalLM.from_pretrained(bee_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(bee_folder)
    for row, choice, text in zip(ROWS, samples["shapes_choice"], samples["shapes_text"], strict=True):
        context = tokenizer(row["question"], return_tensors="pt")
        length = context["input_ids"].shape[1]
        for answer, response in zip(row["choices"], choice["resps"], strict=True):
            ids = tokenizer(f"{row['question']} {answer}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                log_probabilities = model(ids).logits[0, length - 1 : -1].log_softmax(-1)
            expected = log_probabilities.gather(-1, ids[0, length:, None]).sum().item()
            assert float(response[0][0]) == pytest.approx(expected, abs=1e-3)
        new = model.generate(**context, max_new_tokens=5, do_sample=False)[0, length:]
        assert text["resps"][0][0] == tokenizer.decode(new, skip_special_tokens=True)
