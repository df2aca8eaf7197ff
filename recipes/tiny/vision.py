"""The vision tower learns to see before it meets a language: as BEiT-3 had, before it became VisCPM's.

Its rows are three for each shape of a picture, which say its place, its colour and its kind; one linear head, which is
thrown away afterwards, reads them all. Which shape comes first is the tower's own choice.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from viscpm_hf import Beit3Model
from viscpm_hf.modeling.configuration_beit3 import POSITION_OFFSET
from viscpm_hf.shapes import COLOURS, KINDS, PLACES, Scene, draw
from viscpm_hf.shapes.scene import layout_split, random_scene


MAX_SHAPES, ROWS_OF_SHAPE = 3, 3
UNCLEAR, NOTHING = "unclear", "nothing"
MARKS = {mark: number for number, mark in enumerate([*PLACES, *COLOURS, *KINDS, UNCLEAR, NOTHING])}
ORDERS = torch.tensor(list(itertools.permutations(range(MAX_SHAPES))))


def initialize(tower: Beit3Model) -> None:
    """A start from which so small a tower finds places and outlines soon.

    Positions are waves across and down the picture, as strong as what the patches show; a white patch shows nothing.
    """
    embeddings, width = tower.embeddings, tower.config.hidden_size
    grid = embeddings.grid_size
    down, across = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    frequencies = 1.5 * torch.exp(torch.linspace(0, -3.5, width // 4))
    angles = [axis.flatten()[:, None] * frequencies for axis in (across, down)]
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    patches = embeddings.patch_embedding
    with torch.no_grad():
        embeddings.image_position_embedding.weight[POSITION_OFFSET + 1 :] = waves
        embeddings.query_tokens.normal_()
        patches.bias.copy_(-0.9 * patches.weight.sum((1, 2, 3)))
        for layer in tower.layers:
            for experts in (layer.self_attn.q_experts, layer.self_attn.k_experts):
                experts.image.weight.mul_(2)
                experts.query.weight.mul_(2)


def labels_of(scene: Scene) -> list[list[int]]:
    """`(shapes, rows)`: the marks of every shape, and of those that are not there."""
    labels = []
    for shape in scene.shapes:
        place = UNCLEAR if shape.place is None else shape.place
        labels.append([MARKS[place], MARKS[shape.colour], MARKS[shape.kind]])
    return labels + [[MARKS[NOTHING]] * ROWS_OF_SHAPE] * (MAX_SHAPES - len(labels))


def examples(rng: random.Random, count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(count, 3, side, side)` pictures of the training split in -1..1, and their `(count, shapes, rows)` labels."""
    pictures, labels = [], []
    while len(pictures) < count:
        scene = random_scene(rng)
        if layout_split(scene) == "train":
            pictures.append(np.asarray(draw(scene, side)).transpose(2, 0, 1))
            labels.append(labels_of(scene))
    return torch.from_numpy(np.stack(pictures)).float() / 127.5 - 1, torch.tensor(labels)


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, the shapes in the order that fits best.

    Args:
        logits: `(batch, shapes * rows, marks)`.
        labels: `(batch, shapes, rows)`.
    """
    entropies = -logits.float().log_softmax(-1).unflatten(1, (MAX_SHAPES, ROWS_OF_SHAPE))
    # (batch, told shape, true shape): what it costs that the one tells of the other.
    costs = torch.stack(
        [entropies.gather(-1, labels[:, [true] * MAX_SHAPES, :, None]).sum((-1, -2)) for true in range(MAX_SHAPES)], -1
    )
    totals = costs[:, range(MAX_SHAPES), ORDERS].sum(-1)
    return totals.min(-1).values.mean() / (MAX_SHAPES * ROWS_OF_SHAPE)


def train_tower(tower: Beit3Model, steps: int, batch_size: int, learning_rate: float, seed: int) -> list[dict]:
    """Trains the tower in place; returns the losses."""
    initialize(tower)
    tower.set_attn_implementation("eager")
    config = tower.config
    head = nn.Linear(config.hidden_size, len(MARKS))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 50, steps)
    rng, log, total = random.Random(f"{seed}/vision"), [], 0.0
    for step in range(1, steps + 1):
        pictures, labels = examples(rng, batch_size, config.image_size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = head(tower(pictures).last_hidden_state)
        loss = loss_of(logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 50 == 0:
            log.append({"step": step, "loss": total / 50})
            print(f"step {step} of {steps}: loss {total / 50:.4f}", flush=True)
            total = 0.0
    return log
