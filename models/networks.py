"""The deep part of the CTR network, beside the tables of tables.py: a low-rank cross and a small joint hidden layer.

Everything that depends on the variant alone is computed once per set of variants (`variant_side`) and everything that
depends on user and context alone once per user (`user_side`); `score` joins them. The low-rank cross is the cross layer
of DCN-V2 (Wang et al. 2021, arXiv 2008.13535, eq. 2) between the two sides. Several small heads with seeds of their own
are averaged (a seed ensemble in one graph, as in TabM, Gorishniy et al. 2025, arXiv 2410.24210). Modules are pure: no
files, no device, no seed.

Axis letters: B users, N variants, F crossed fields, V numeric values, C crossed side columns, T crossed tags, M heads,
H hidden width, K rank of the cross.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class DeepConfig:
    """Size of the deep part."""

    side_columns: int  # C
    tag_columns: int  # T
    heads: int = 4  # M
    width: int = 32  # H
    rank: int = 16  # K


class DeepSide(NamedTuple):
    """One side's half of the deep part."""

    additive: Tensor  # (M, rows, H): enters the joint hidden layer as a sum
    factor: Tensor  # (M, rows, K): enters the low-rank cross as a product


class DeepPart(nn.Module):
    """What the tables cannot say: combinations of several user and context features with several tags."""

    def __init__(self, config: DeepConfig) -> None:
        super().__init__()
        m, h, k = config.heads, config.width, config.rank
        self.config = config
        self.user_embedding = nn.Parameter(torch.empty(config.side_columns, m * h))
        self.tag_embedding = nn.Parameter(torch.empty(config.tag_columns, m * h))
        self.user_bias = nn.Parameter(torch.zeros(m, 1, h))
        self.tag_bias = nn.Parameter(torch.zeros(m, 1, h))
        self.user_out = nn.Parameter(torch.empty(m, h, h + k))
        self.tag_out = nn.Parameter(torch.empty(m, h, h + k))
        self.cross = nn.Parameter(torch.zeros(m, 1, k))
        self.top = nn.Parameter(torch.zeros(m, h, 1))

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights; the output starts at exactly 0."""
        with torch.no_grad():
            for weight, scale in (
                (self.user_embedding, 0.3),
                (self.tag_embedding, 0.3),
                (self.user_out, self.config.width**-0.5),
                (self.tag_out, self.config.width**-0.5),
            ):
                weight.normal_(0.0, scale, generator=generator)

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.view(len(flat), self.config.heads, self.config.width).transpose(0, 1)  # (M, rows, H)

    def user_side(self, columns: Tensor, data: Tensor) -> DeepSide:
        """`columns` (B, F + V) crossed side columns that are set, `data` (B, F + V) their values."""
        flat = functional.embedding_bag(columns, self.user_embedding, per_sample_weights=data, mode="sum")  # (B, M·H)
        return self._split(functional.relu(self._heads(flat) + self.user_bias) @ self.user_out)

    def variant_side(self, tags: Tensor) -> DeepSide:
        """`tags` (N, T) multi-hot."""
        return self._split(functional.relu(self._heads(tags @ self.tag_embedding) + self.tag_bias) @ self.tag_out)

    def _split(self, out: Tensor) -> DeepSide:
        return DeepSide(out[..., : self.config.width], out[..., self.config.width :])

    def pairs(self, user: DeepSide, variant: DeepSide) -> Tensor:
        """Logits of row i's user with row i's variant: (M, B)."""
        hidden = functional.relu(user.additive + variant.additive)  # (M, B, H)
        return (hidden @ self.top).squeeze(-1) + (user.factor * self.cross * variant.factor).sum(-1)

    def score(self, user: DeepSide, variant: DeepSide) -> Tensor:
        """Logits of every user with every variant, averaged over heads: (B, N)."""
        crossed = torch.einsum("mbk,mnk->bn", user.factor * self.cross, variant.factor)
        for m in range(self.config.heads):
            hidden = functional.relu(user.additive[m, :, None] + variant.additive[m, None])  # (B, N, H)
            crossed = crossed + (hidden @ self.top[m]).squeeze(-1)
        return crossed / self.config.heads
