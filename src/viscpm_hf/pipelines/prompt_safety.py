"""Checking prompts before anything is drawn, with the text classifier of VisCPM-Paint's repository."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast


# Where the original has it: a folder of its repository.
PROMPT_CHECKER_REPOSITORY = "openbmb/VisCPM-Paint"
PROMPT_CHECKER_FOLDER = "text-security-checker"

# The original's name of the label that refuses; which of the labels it is, the checker's configuration says.
UNSAFE_LABEL = "LABEL_1"
OTHER_UNSAFE_LABELS = ("unsafe", "nsfw", "sensitive", "toxic", "illegal", "harmful", "不安全", "违规", "敏感")
UNSAFE_SCORE = 0.75
# Windows of a long prompt that are looked at together.
WINDOWS_TOGETHER = 16


class UnsafePromptError(ValueError):
    """The prompt checker refused a prompt; nothing was drawn."""


def unsafe_label(config: BertConfig) -> int:
    """Index of the label that refuses a prompt.

    Raises:
        ValueError: if the labels' names don't say.
    """
    names = {int(index): str(name) for index, name in config.id2label.items()}
    found = [index for index, name in names.items() if name == UNSAFE_LABEL]
    found = found or [index for index, name in names.items() if name.lower() in OTHER_UNSAFE_LABELS]
    if len(found) != 1 or len(names) < 2:
        raise ValueError(
            f"The prompt checker's labels are {', '.join(names.values())}, and none of them says that it is the one "
            f"that refuses: name it {UNSAFE_LABEL} or {OTHER_UNSAFE_LABELS[0]} in its config.json (id2label)."
        )
    return found[0]


@torch.no_grad()
def check_prompts(
    prompt_checker: BertForSequenceClassification,
    tokenizer: BertTokenizerFast,
    prompts: Sequence[str],
    threshold: float = UNSAFE_SCORE,
) -> list[str | None]:
    """Why a prompt is refused, for each prompt; None for those that aren't.

    A prompt is refused if the classifier's unsafe label has the highest score and that is over the threshold; one that
    is longer than the classifier takes if that is so for any of its windows, which overlap by a quarter.
    """
    unsafe = unsafe_label(prompt_checker.config)
    windows: list[list[int]] = []
    owners: list[int] = []
    room = prompt_checker.config.max_position_embeddings - 2
    for owner, prompt in enumerate(prompts):
        ids = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        begins = range(0, max(len(ids) - room // 4, 1), room - room // 4)
        windows += [[tokenizer.cls_token_id, *ids[begin : begin + room], tokenizer.sep_token_id] for begin in begins]
        owners += [owner] * len(begins)
    worst = [0.0] * len(prompts)
    for begin in range(0, len(windows), WINDOWS_TOGETHER):
        part = windows[begin : begin + WINDOWS_TOGETHER]
        inputs = tokenizer.pad({"input_ids": part}, return_tensors="pt").to(prompt_checker.device)
        scores, labels = prompt_checker(**inputs).logits.float().softmax(-1).max(-1)
        for owner, score, label in zip(owners[begin:], scores.tolist(), labels.tolist(), strict=False):
            if label == unsafe:
                worst[owner] = max(worst[owner], score)
    name = prompt_checker.config.id2label[unsafe]
    return [
        f"the prompt checker says {name} with a score of {score:.3f}, over {threshold}" if score > threshold else None
        for score in worst
    ]


__all__ = ["PROMPT_CHECKER_FOLDER", "PROMPT_CHECKER_REPOSITORY", "UNSAFE_SCORE", "UnsafePromptError", "check_prompts"]
