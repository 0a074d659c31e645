"""Comparing models and tuning methods at the command line."""

from __future__ import annotations

import sys
from typing import Any, Literal

from segvit.cli.parsing import show
from segvit.contracts import UserError


def compare(
    *, data: str, out: str, models: str | None = None, adapters: str | None = None, init: str | None = None,
    weights: str | None = None, minutes: float | None = None, steps: int | None = None, config: str | None = None,
    crop: tuple[int, int] | None = None, batch_size: int | None = None, workers: int | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Train several models, or tune one by several methods, on the same budget; set accuracy against size and cost.

    A second call goes on where the first one ended. Exit code 1 when one failed; the others are compared.

    Args:
        data: Dataset with a train and a val split.
        out: Folder for compare.json, compare.md, index.html and a run folder of each model or method.
        models: Names with commas between them, see segvit models list; with adapters one name at most.
        adapters: Tuning methods with commas between them, see segvit adapters list; None = compare models.
        init: Run or model folder whose weights all methods start from; it also says the model and the crop.
        weights: Pretrained backbone weights that all methods start from: a hub name or a local file.
        minutes: Training time of each; give this or steps.
        steps: Training steps of each.
        config: Recipe for all of them; None = batches of 8, an optimiser for each kind of model or method.
        crop: Height and width of the training crop, at which cost and latency are measured; None = the recipe's, the
            init's, or 256 x 256.
        batch_size: Images in a step; None = the recipe's.
        workers: Processes that load data; None = the recipe's, else 2.
        device: Where to train and measure; None = the recipe's, else auto.
        json: Print the figures as JSON.
    """
    from segvit.tasks.compare import Budget
    from segvit.tasks.compare import compare as run
    from segvit.tasks.compare_adapters import compare_adapters

    names, methods = listed(models), listed(adapters)
    budget = Budget(steps=steps, minutes=minutes)
    given: dict[str, Any] = {
        "config": config, "crop": crop, "batch_size": batch_size, "workers": workers, "device": device
    }  # fmt: skip
    if not methods:
        if init or weights:
            raise UserError("--init and --weights go with --adapters; models are compared from nothing")
        result = run(data, names, out, budget, **given)
    elif len(names) > 1:
        raise UserError(f"--adapters tunes one model, but --models names {len(names)}; give one")
    else:
        model = names[0] if names else None
        result = compare_adapters(data, methods, out, budget, model=model, init=init, weights=weights, **given)
    show(result.report, json, result.text)
    if not result.complete:
        sys.exit(1)


def listed(names: str | None) -> list[str]:
    """Names with commas between them, one by one."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]
