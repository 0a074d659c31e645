"""Comparing models at the command line."""

from __future__ import annotations

import sys
from typing import Literal

from segvit.cli.parsing import show


def compare(
    *, data: str, models: str, out: str, minutes: float | None = None, steps: int | None = None,
    config: str | None = None, crop: tuple[int, int] | None = None, batch_size: int | None = None,
    workers: int | None = None, device: Literal["auto", "cpu", "cuda"] | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Train several models on the same budget and set accuracy against size, cost and latency.

    A second call goes on where the first one ended. Exit code 1 when a model failed; the others are compared.

    Args:
        data: Dataset with a train and a val split.
        models: Names with commas between them, see segvit models list.
        out: Folder for compare.json, compare.md, index.html and a run folder of each model.
        minutes: Training time of each model; give this or steps.
        steps: Training steps of each model.
        config: Recipe for all of them; None = crops of 256 x 256, batches of 8, an optimiser for each kind of model.
        crop: Height and width of the training crop, at which cost and latency are measured; None = the recipe's.
        batch_size: Images in a step; None = the recipe's.
        workers: Processes that load data; None = the recipe's, else 2.
        device: Where to train and measure; None = the recipe's, else auto.
        json: Print the figures as JSON.
    """
    from segvit.tasks.compare import Budget
    from segvit.tasks.compare import compare as run

    names = [name.strip() for name in models.split(",") if name.strip()]
    result = run(
        data, names, out, Budget(steps=steps, minutes=minutes), config=config, crop=crop, batch_size=batch_size,
        workers=workers, device=device,
    )  # fmt: skip
    show(result.report, json, result.text)
    if not result.complete:
        sys.exit(1)
