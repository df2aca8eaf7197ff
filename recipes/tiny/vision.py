"""The vision tower learns to see before it meets a language: as BEiT-3 had, before it became VisCPM's.

Its rows are three for each shape of a picture, which say its place, its colour and its kind; one linear head reads
them all. Which shape comes first is the tower's own choice. So that it soon finds the shapes at all, another head asks
every patch before the last layer what shape it lies on, and where that one's middle is. Both heads are thrown away
afterwards.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from viscpm_hf import Beit3Config, Beit3Model
from viscpm_hf.modeling.configuration_beit3 import POSITION_OFFSET
from viscpm_hf.shapes import COLOURS, KINDS, PLACES, Scene, draw
from viscpm_hf.tiny.scene import layout_split, random_scene
from viscpm_hf.training.muon import MuonWithAdamW


MAX_SHAPES, ROWS_OF_SHAPE = 3, 3
PATCHES_SHARE = 0.5
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


def patches_of(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """What the patches lie on: `(2, grid²)` numbers of kind and colour, `(grid², 2)` ways to the shape's middle."""
    marks = np.empty((2, grid, grid), dtype=np.int64)
    marks[0], marks[1] = len(KINDS), len(COLOURS)
    ways = np.zeros((grid, grid, 2), dtype=np.float32)
    middles = (np.arange(grid) + 0.5) / grid
    for shape in scene.shapes:
        reach = shape.size / 2 + 0.5 / grid - 0.02  # as far as a patch that it covers a little
        rows, columns = (np.flatnonzero(abs(middles - middle) < reach) for middle in (shape.y, shape.x))
        box = np.ix_(rows, columns)
        marks[0][box], marks[1][box] = list(KINDS).index(shape.kind), list(COLOURS).index(shape.colour)
        ways[box] = np.stack(np.meshgrid(shape.x - middles[columns], shape.y - middles[rows]), axis=-1)
    return marks.reshape(2, -1), ways.reshape(-1, 2)


def examples(rng: random.Random, count: int, config: Beit3Config) -> tuple[torch.Tensor, ...]:
    """`(count, 3, side, side)` pictures of the training split in -1..1, their `(count, shapes, rows)` labels, and what
    `patches_of` says of them: `(count, 2, patches)` and `(count, patches, 2)`."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        if layout_split(scene := random_scene(rng)) == "train":
            scenes.append(scene)
    pictures = np.stack([np.asarray(draw(scene, config.image_size)).transpose(2, 0, 1) for scene in scenes])
    patches = [patches_of(scene, config.image_size // config.patch_size) for scene in scenes]
    return (
        torch.from_numpy(pictures).float() / 127.5 - 1,
        torch.tensor([labels_of(scene) for scene in scenes]),
        *(torch.from_numpy(np.stack(part)) for part in zip(*patches, strict=True)),
    )


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


class PatchHead(nn.Module):
    """Asks the patches, as the layer before the last leaves them, what they lie on."""

    def __init__(self, tower: Beit3Model):
        super().__init__()
        self.norm = nn.LayerNorm(tower.config.hidden_size)
        self.linear = nn.Linear(tower.config.hidden_size, len(KINDS) + 1 + len(COLOURS) + 1 + 2)
        self.num_patches = (tower.config.image_size // tower.config.patch_size) ** 2
        tower.layers[-2].register_forward_hook(self.keep)

    def keep(self, layer: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        self.hidden_states = output[:, 1 : self.num_patches + 1]  # after the class token

    def loss(self, marks: torch.Tensor, ways: torch.Tensor) -> torch.Tensor:
        """Of `(batch, 2, patches)` and `(batch, patches, 2)`, see `patches_of`."""
        answers = self.linear(self.norm(self.hidden_states)).float()
        kinds, colours, told_ways = answers.split((len(KINDS) + 1, len(COLOURS) + 1, 2), dim=-1)
        on_shape = (marks[:, 0] < len(KINDS)).unsqueeze(-1)
        way_errors = ((told_ways - ways).abs() * on_shape).sum() / on_shape.sum()
        entropies = [F.cross_entropy(part.transpose(1, 2), marks[:, i]) for i, part in enumerate((kinds, colours))]
        return sum(entropies) + 4 * way_errors


def train_tower(tower: Beit3Model, steps: int, batch_size: int, learning_rate: float, seed: int) -> list[dict]:
    """Trains the tower in place; returns the losses of its rows."""
    initialize(tower)
    tower.set_attn_implementation("eager")
    config = tower.config
    head, patch_head = nn.Linear(config.hidden_size, len(MARKS)), PatchHead(tower)
    trained = nn.ModuleList([tower, head, patch_head])
    optimizer = MuonWithAdamW(trained, learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 50, steps)
    rng, log, total = random.Random(f"{seed}/vision"), [], 0.0
    for step in range(1, steps + 1):
        pictures, labels, marks, ways = examples(rng, batch_size, config)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(head(tower(pictures).last_hidden_state), labels)
            patch_loss = patch_head.loss(marks, ways)
        (loss + PATCHES_SHARE * patch_loss).backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 50 == 0:
            log.append({"step": step, "loss": total / 50})
            print(f"step {step} of {steps}: loss {total / 50:.4f}", flush=True)
            total = 0.0
    return log
