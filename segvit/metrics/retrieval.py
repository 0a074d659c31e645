"""Recall@K of embeddings by cosine similarity, exact, in chunks of queries.

Policy    as in metric learning (CUB-200-2011, Cars-196): every image asks all others, itself left out, and counts 1
          where any of its K nearest has its class. Of equally similar images those of other classes come first, so
          that a network which maps all images to one point scores 0 and not 1.
          A query whose class nothing else has is an error: no ranking could find it.

Shapes    N queries, M images of the gallery, C channels of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segvit.contracts import UserError

Gallery = tuple[NDArray[Any], NDArray[Any]]  # embeddings (M, C) and labels (M,)


def recall_at_k(
    embeddings: NDArray[Any], labels: NDArray[Any], *, ks: Sequence[int] = (1, 2, 4, 8), gallery: Gallery | None = None,
    chunk: int = 1024,
) -> dict[int, float]:  # fmt: skip
    """Share of the queries, embeddings (N, C) and labels (N,), with one of their class among the K nearest, by K.

    Without `gallery` the queries are searched among themselves. `chunk` queries are compared at a time, which bounds
    the memory by `chunk` x M numbers and changes nothing else.
    Raises UserError as `wrong_ahead` does, and for a K that is not in 1 ... the number of images to find.
    """
    ahead = wrong_ahead(embeddings, labels, gallery=gallery, chunk=chunk)
    most = len(labels) - 1 if gallery is None else len(gallery[1])
    if not ks or min(ks) < 1 or max(ks) > most:
        raise UserError(f"Recall@K for K = {list(ks)}, but there are {most} images to find; choose K in 1 ... {most}")
    return {k: float(np.mean(ahead < k)) for k in ks}


def wrong_ahead(
    embeddings: NDArray[Any], labels: NDArray[Any], *, gallery: Gallery | None = None, chunk: int = 1024
) -> NDArray[np.int64]:
    """For each query (N,) how many images of other classes are at least as similar as the best one of its own.

    Raises UserError for other shapes, for embeddings of length 0 or not finite, for a query whose class nothing else
    has, and for a `chunk` below 1.
    """
    if chunk < 1:
        raise UserError(f"chunk is {chunk}; compare 1 query at a time or more")
    queries, targets = directions(embeddings, labels, what="queries"), labels
    if gallery is not None:
        targets = gallery[1]
        found = directions(*gallery, what="gallery")
    else:
        found = queries
    if queries.shape[1] != found.shape[1]:
        raise UserError(f"queries have {queries.shape[1]} channels, the gallery {found.shape[1]}; use one network")
    check_classes(labels, targets, copies=2 if gallery is None else 1)
    ahead = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        similarity = queries[rows] @ found.T
        same = labels[rows, None] == targets[None]
        if gallery is None:
            own = np.arange(len(similarity))
            similarity[own, start + own] = -np.inf
        best = np.where(same, similarity, -np.inf).max(1, keepdims=True)
        ahead[rows] = np.sum((similarity >= best) & ~same, axis=1)
    return ahead


def directions(embeddings: NDArray[Any], labels: NDArray[Any], *, what: str) -> NDArray[np.float32]:
    """Embeddings of length 1. Raises UserError where they are none."""
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or not len(labels):
        raise UserError(
            f"{what}: embeddings {embeddings.shape}, labels {labels.shape}; give (N, C) and (N,) of 1 image or more"
        )
    lengths, bad = measured(embeddings)
    if len(bad):
        raise UserError(
            f"{what}: embedding {bad[0]} has length {lengths[bad[0], 0]} ({len(bad)} like it); cosines need finite "
            "vectors that are not 0"
        )
    return (embeddings / lengths).astype(np.float32)


def measured(embeddings: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Lengths (N, 1) of embeddings (N, C), and the places of those without a direction: 0 or not finite."""
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    return lengths, np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))


def check_classes(labels: NDArray[Any], targets: NDArray[Any], *, copies: int) -> None:
    """Raise UserError for labels that occur less than `copies` times among the targets."""
    known, counts = np.unique(targets, return_counts=True)
    lonely = np.setdiff1d(labels, known[counts >= copies])
    if len(lonely):
        raise UserError(
            f"class {lonely[0]} ({len(lonely)} such): no other image to find; add images of it or leave it out"
        )
