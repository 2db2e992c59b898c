"""The deep part as a pure module."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from models.networks import DeepConfig, DeepPart, DeepSide

B, N = 7, 5
CONFIG = DeepConfig(side_columns=11, tag_columns=6, heads=3, width=8, rank=4)


def deep_part(*, untrained: bool = False) -> DeepPart:
    deep, generator = DeepPart(CONFIG), torch.Generator().manual_seed(0)
    deep.initialise(generator)
    if not untrained:
        with torch.no_grad():
            deep.top.normal_(generator=generator)
            deep.cross.normal_(generator=generator)
    return deep


def sides(deep: DeepPart) -> tuple[DeepSide, DeepSide]:
    generator = torch.Generator().manual_seed(1)
    columns = torch.randint(0, CONFIG.side_columns, (B, 3), generator=generator)
    tags = (torch.rand(N, CONFIG.tag_columns, generator=generator) < 0.4).float()
    return deep.user_side(columns, torch.rand(B, 3, generator=generator)), deep.variant_side(tags)


def test_output_starts_at_exactly_zero() -> None:
    deep = deep_part(untrained=True)
    assert deep.score(*sides(deep)).abs().max() == 0.0


def test_score_equals_pairs_entry_by_entry() -> None:
    deep = deep_part()
    users, variants = sides(deep)
    score = deep.score(users, variants)
    assert score.shape == (B, N)
    for v in range(N):
        same = DeepSide(*(half[:, [v] * B] for half in variants))
        torch.testing.assert_close(deep.pairs(users, same).mean(dim=0), score[:, v])


def test_scores_follow_the_variants_when_these_are_reordered() -> None:
    deep = deep_part()
    users, variants = sides(deep)
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = DeepSide(*(half[:, order] for half in variants))
    torch.testing.assert_close(deep.score(users, moved), deep.score(users, variants)[:, order])


def test_defaults_of_the_config_run() -> None:
    deep = DeepPart(DeepConfig(4, 3))
    deep.initialise(torch.Generator().manual_seed(0))
    users, variants = deep.user_side(torch.tensor([[0, 3]]), torch.ones(1, 2)), deep.variant_side(torch.ones(2, 3))
    assert deep.score(users, variants).shape == (1, 2)


def test_overfits_one_batch() -> None:
    deep, rng = deep_part(untrained=True), np.random.default_rng(0)
    columns, tags = (
        torch.from_numpy(rng.integers(0, 11, (32, 3))),
        torch.eye(6)[torch.from_numpy(rng.integers(0, 6, 32))],
    )
    reward = torch.from_numpy((rng.random(32) < 0.5).astype(np.float32))
    optimiser = torch.optim.Adam(deep.parameters(), lr=0.02)
    for _ in range(150):
        logits = deep.pairs(deep.user_side(columns, torch.ones(32, 3)), deep.variant_side(tags))
        loss = functional.binary_cross_entropy_with_logits(logits, reward.expand_as(logits))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() == pytest.approx(0.0, abs=0.05)
