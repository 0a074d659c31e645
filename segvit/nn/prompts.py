"""Visual prompts in the gaps of a plain ViT: learned tokens behind the prefix, and others in their place further on.

Paper     M. Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119.

Shapes    B images, P prompts, D channels, D' channels of a prompt before projection.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from segvit.contracts import Size
from segvit.nn.tokens import Step


def fresh_prompts(*shape: int, patch: Size, like: Tensor) -> nn.Parameter:
    """Uniform within Xavier's limit for a patch embedding of three channels, (..., D') on the device of `like`."""
    limit = math.sqrt(6 / (3 * patch[0] * patch[1] + shape[-1]))
    return nn.Parameter(torch.empty(shape, device=like.device, dtype=like.dtype).uniform_(-limit, limit))


class Prompts(nn.Module):
    """The gap before the first block: puts the prompts behind the prefix; keeps those of all other blocks."""

    def __init__(
        self, *, num_prompts: int, layers: int, dim: int, patch: Size, project_dim: int | None, dropout: float,
        like: Tensor,
    ) -> None:  # fmt: skip
        super().__init__()
        width = project_dim or dim
        self.prompt_embeddings = fresh_prompts(1, num_prompts, width, patch=patch, like=like)
        self.deep_prompt_embeddings = (
            fresh_prompts(layers - 1, num_prompts, width, patch=patch, like=like) if layers > 1 else None
        )
        self.prompt_proj: nn.Module = nn.Identity()
        if project_dim is not None:
            self.prompt_proj = nn.Linear(width, dim, device=like.device, dtype=like.dtype)
            nn.init.kaiming_normal_(self.prompt_proj.weight, mode="fan_out")
        self.prompt_dropout = nn.Dropout(dropout)

    def tokens(self, layer: int, batch: int) -> Tensor:
        """The prompts of a block for every image, (B, P, D)."""
        deep = self.deep_prompt_embeddings
        own = self.prompt_embeddings[0] if layer == 0 or deep is None else deep[layer - 1]
        return cast(Tensor, self.prompt_dropout(self.prompt_proj(own).expand(batch, -1, -1)))

    def forward(self, step: Step) -> Step:
        prompts = self.tokens(0, step.tokens.shape[0])
        parts = [step.tokens[:, : step.prefix], prompts, step.tokens[:, step.prefix :]]
        return step._replace(tokens=torch.cat(parts, dim=1), prefix=step.prefix + prompts.shape[1])


class DeepPrompts(nn.Module):
    """The gap before a later block: its prompts take the place of the last ones, which end the prefix."""

    def __init__(self, prompts: Prompts, layer: int) -> None:
        super().__init__()
        self.shared, self.layer = (prompts,), layer  # in a tuple: the first gap has registered it

    def forward(self, step: Step) -> Step:
        prompts = self.shared[0].tokens(self.layer, step.tokens.shape[0])
        head = step.tokens[:, : step.prefix - prompts.shape[1]]
        return step._replace(tokens=torch.cat([head, prompts, step.tokens[:, step.prefix :]], dim=1))
