"""Checking prompts before anything is drawn, with the text classifier of VisCPM-Paint's repository."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import BertForSequenceClassification, BertTokenizerFast


# Where the original has it: a folder of its repository.
PROMPT_CHECKER_REPOSITORY = "openbmb/VisCPM-Paint"
PROMPT_CHECKER_FOLDER = "text-security-checker"

UNSAFE_LABEL = 1
UNSAFE_SCORE = 0.75


class UnsafePromptError(ValueError):
    """The prompt checker refused a prompt; nothing was drawn."""


@torch.no_grad()
def check_prompts(
    prompt_checker: BertForSequenceClassification,
    tokenizer: BertTokenizerFast,
    prompts: Sequence[str],
    threshold: float = UNSAFE_SCORE,
) -> list[str | None]:
    """Why a prompt is refused, for each prompt; None for those that aren't.

    A prompt is refused if the classifier's label 1 has the higher score and that is over the threshold.
    """
    inputs = tokenizer(
        list(prompts),
        padding=True,
        truncation=True,
        max_length=prompt_checker.config.max_position_embeddings,
        return_tensors="pt",
    ).to(prompt_checker.device)
    scores, labels = prompt_checker(**inputs).logits.float().softmax(-1).max(-1)
    name = prompt_checker.config.id2label[UNSAFE_LABEL]
    return [
        f"the prompt checker says {name} with a score of {score:.3f}, over {threshold}"
        if label == UNSAFE_LABEL and score > threshold
        else None
        for score, label in zip(scores.tolist(), labels.tolist(), strict=True)
    ]


__all__ = ["PROMPT_CHECKER_FOLDER", "PROMPT_CHECKER_REPOSITORY", "UNSAFE_SCORE", "UnsafePromptError", "check_prompts"]
