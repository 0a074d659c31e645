"""Class scores for a band of pixel rows, so that a full-resolution tensor of all classes never exists.

Shapes    B images, K classes, Q queries, h w map grid, H W pixels, R rows of a band.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from segvit.contracts import Dense, Size


def bilinear_rows(maps: Tensor, size: Size, rows: range, *, height: int | None = None, first: int = 0) -> Tensor:
    """Rows of the bilinear resize (align_corners=False, no antialias) of (B, C, h, w) to `size`: (B, C, R, W).

    The rows equal those of a full resize up to rounding, whatever the band: rows are blended first, on the small map,
    then columns by a matrix product, which is twice as fast as the library's kernel on a CPU. `maps` may be a part of
    the full map: rows `first` on of `height`.
    """
    height = maps.shape[-2] if height is None else height
    if height != size[0]:
        above, blend = source_rows(height, size[0], rows)
        upper, lower = (torch.from_numpy(row - first).to(maps.device) for row in (above, next_rows(above, height)))
        weight = torch.from_numpy(blend).to(maps)[:, None]  # (R, 1)
        maps = maps.index_select(2, upper) * (1 - weight) + maps.index_select(2, lower) * weight  # (B, C, R, w)
    else:
        maps = maps[:, :, rows.start - first : rows.stop - first]
    if maps.shape[-1] == size[1]:
        return maps
    if maps.is_meta:  # where only costs are counted, by the papers' convention: with the library's resize
        return F.interpolate(maps, size=(len(rows), size[1]), mode="bilinear", align_corners=False)
    return maps @ bilinear_matrix(maps.shape[-1], size[1], device=maps.device, dtype=maps.dtype).mT


def source_rows(height: int, new_height: int, rows: range) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each row of a resize from `height` to `new_height`: the source row above and the weight of the next one."""
    places = np.maximum((np.arange(rows.start, rows.stop) + 0.5) * height / new_height - 0.5, 0.0)
    above = np.minimum(places.astype(np.int64), height - 1)
    return above, places - above


def next_rows(above: NDArray[np.int64], height: int) -> NDArray[np.int64]:
    """The rows below those; below the last one, itself."""
    return np.minimum(above + 1, height - 1)


def bilinear_matrix(old: int, new: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(new, old): each row has the weights of the two neighbours that make one output row."""
    above, blend = source_rows(old, new, range(new))
    weight = torch.from_numpy(blend).to(device, dtype)
    matrix = torch.zeros(new, old, device=device, dtype=dtype)
    number, first, second = (torch.from_numpy(a).to(device) for a in (np.arange(new), above, next_rows(above, old)))
    matrix[number, first] = 1 - weight
    matrix.index_put_((number, second), weight, accumulate=True)
    return matrix


def logit_rows(out: Dense, size: Size, rows: range) -> Tensor:
    """The default readout: logits resized over the area that they cover, cropped to the input (B, K, R, W)."""
    return bilinear_rows(out.logits, out.covers, rows)[..., : size[1]]


def mix_masks(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Semantic inference of mask classification: (B, Q, K) class probabilities, (B, Q, h, w) mask probabilities.

    Returns (B, K, h, w): for every class the sum over queries of probability times mask.
    """
    return torch.bmm(probabilities.mT, masks.flatten(2)).unflatten(2, masks.shape[-2:])
