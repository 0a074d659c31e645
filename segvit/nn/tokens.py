"""Tokens of a plain vision transformer between two blocks, and the ways between tokens and maps.

Shapes    B images, N = h * w patch tokens on an h w grid, P prefix tokens (class, registers, prompts), D channels.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import SymInt, Tensor

from segvit.contracts import Size


class Step(NamedTuple):
    """The state between two blocks; what adapters see in the gaps."""

    tokens: Tensor  # (B, P + N, D), prefix first
    prefix: int  # P; positions, rotary ones too, belong to the tokens after it
    grid: Size  # of the N patch tokens now
    base: Size  # of the patch tokens as embedded; differs from `grid` once tokens were dropped
    kept: Tensor | None = None  # (N,) which tokens of `base` are left; None = all
    rope: Tensor | None = None  # (N, 2d) or (heads, N, 2d), one per block where the rotation is learned (depth, ...)
    extras: dict[str, Tensor] = {}  # what adapters hand on, to the next gap and to Features; never mutated in place


def patch_map(step: Step) -> Tensor:
    """The patch tokens as a map (B, D, h, w); a view where possible."""
    return step.tokens[:, step.prefix :].mT.unflatten(2, step.grid)


def map_step(features: Tensor, extras: dict[str, Tensor]) -> Step:
    """A pyramid's map (B, D, h, w) as the state between two stages; `patch_map` gives it back."""
    grid = (features.shape[-2], features.shape[-1])
    return Step(map_tokens(features), 0, grid, grid, extras=extras)


def map_tokens(features: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, h*w, D), row by row."""
    return features.flatten(2).mT


def pad_to_patches(images: Tensor, patch: Size) -> Tensor:
    """Zeros at the right and the bottom up to whole patches."""
    height, width = images.shape[-2:]
    # Not -height % patch: torch's compiler cannot bound the remainder of a negative size that it does not know.
    down, across = ((side + part - 1) // part * part for side, part in ((height, patch[0]), (width, patch[1])))
    return pad_beyond(images, down - height, across - width)


def pad_beyond(images: Tensor, below: int | SymInt, right: int | SymInt) -> Tensor:
    """That many rows of zeros at the bottom and columns at the right."""
    if isinstance(below, int) and isinstance(right, int) and not below and not right:  # a traced size stays open
        return images
    return F.pad(images, cast("tuple[int, ...]", (0, right, 0, below)))


def resize_positions(positions: Tensor, *, old: Size, new: Size, mode: str = "bicubic") -> Tensor:
    """Position embeddings (1, h0*w0, D) of one grid for another, (1, h*w, D).

    Never antialiased: some exported runtimes silently ignore that flag, and the originals do not use it.
    """
    if all(isinstance(side, int) for side in new) and old == new:  # in a traced graph any size may come later
        return positions
    maps = positions.mT.unflatten(2, old)
    return F.interpolate(maps, size=new, mode=mode, align_corners=False).flatten(2).mT
