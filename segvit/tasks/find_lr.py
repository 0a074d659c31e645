"""The learning-rate finder: one short sweep from tiny to huge rates, and the rate at which the loss falls fastest.

L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, arXiv 1506.01186, section 3.3. Nothing
is written; the model is made for the sweep alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate.utils import set_seed
from numpy.typing import NDArray

from segvit.contracts import UserError
from segvit.data.loading import train_batches
from segvit.engine.fit import NotFiniteError, Progress, fit
from segvit.engine.optim import make_optimizer, parameter_rates
from segvit.engine.settings import Schedule
from segvit.tasks.balance import class_balance
from segvit.tasks.console import aligned, progress_bar
from segvit.tasks.dense import build_model, open_training
from segvit.tasks.experiment import Experiment
from segvit.tasks.procedure import make_procedure
from segvit.tasks.run import draw_lists, grouped, make_accelerator

LOWEST, HIGHEST, STEPS = 1e-7, 1.0, 100
DIVERGED = 4.0  # times the least smoothed loss
MEMORY = 0.9  # of the smoothing; the reach of about ten steps
BELOW_DIVERGENCE = 10.0  # a suggested rate stays that far below the one that diverged
LEAST_STEPS = 20  # of the sweep, below which its slope says nothing
ROWS = 12  # of the printed table


@dataclass(frozen=True)
class FoundRate:
    """What `segvit find_lr` prints: for machines and for people."""

    report: dict[str, Any]
    text: str


class _DivergedError(Exception):
    """The loss has risen so far that higher rates need no trial."""


def find_lr(experiment: Experiment) -> FoundRate:
    """Sweep `optim.lr` from 1e-7 to 1 in 100 steps of the experiment's training and suggest a value for it.

    Other parameters' multiples of the rate are kept. Raises UserError for whatever `train` would refuse, and where the
    sweep breaks off at once.
    """
    accelerator = make_accelerator(experiment)
    experiment, dataset = open_training(experiment)
    set_seed(experiment.seed)
    experiment = replace(experiment, schedule=Schedule(kind="constant", warmup=0))
    balance = class_balance(experiment, dataset)
    model = build_model(experiment, dataset.classes, levels=dataset.levels).to(accelerator.device)
    procedure = make_procedure(experiment, dataset, device=accelerator.device, steps=STEPS, balance=balance)
    lowest = replace(experiment.optim, lr=LOWEST)
    optimizer = make_optimizer(parameter_rates(model.named_parameters(), lowest), lowest)
    network, prepared = accelerator.prepare(model, optimizer)
    loader = train_batches(
        dataset, spec=model.spec, augment=experiment.augment, seed=experiment.seed, rarity=balance.rarity,
        draws=draw_lists(experiment, accelerator, 0, STEPS), workers=experiment.workers,
    )  # fmt: skip
    rates: list[float] = []
    losses: list[float] = []

    with progress_bar("sweeping") as progress:

        def note(row: dict[str, Any]) -> None:
            rates.append(LOWEST * growth() ** len(rates))
            losses.append(row["loss"])
            progress(len(losses), STEPS)
            curve = smoothed(losses)
            if len(losses) >= LEAST_STEPS and curve[-1] > DIVERGED * curve.min():
                raise _DivergedError

        def faster(step: int) -> None:
            for group in optimizer.param_groups:
                group["initial_lr"] *= growth()

        with suppress(_DivergedError, NotFiniteError):
            fit(
                network, prepared, grouped(iter(loader), experiment.accumulate), procedure=procedure,
                accelerator=accelerator, progress=Progress(), average=None, report=note, after=faster,
            )  # fmt: skip
    return described(rates, losses)


def growth() -> float:
    """The factor between the rates of two steps."""
    return float((HIGHEST / LOWEST) ** (1 / (STEPS - 1)))


def smoothed(losses: Sequence[float]) -> NDArray[np.float64]:
    """Exponential moving average, corrected for its start from nothing."""
    average, values = 0.0, np.empty(len(losses))
    for i, loss in enumerate(losses):
        average = MEMORY * average + (1 - MEMORY) * loss
        values[i] = average / (1 - MEMORY ** (i + 1))
    return values


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate where the smoothed loss falls fastest over the logarithm of the rate, two digits.

    At most a tenth of the last rate, where the sweep diverged or ended. Raises UserError for a sweep that is too short
    or along which the loss never fell.
    """
    if len(losses) < LEAST_STEPS:
        raise UserError(f"the loss is not finite after {len(losses)} steps at tiny rates; check the data and the loss")
    curve = smoothed(losses)
    slope = np.gradient(curve, np.log(rates))
    slope[np.asarray(rates) > rates[-1] / BELOW_DIVERGENCE] = np.inf
    best = int(slope.argmin())
    if slope[best] >= 0:
        raise UserError("the loss did not fall at any rate; check data and labels with `segvit data preview`")
    digits = 1 - math.floor(math.log10(rates[best]))
    return round(rates[best], digits)


def described(rates: Sequence[float], losses: Sequence[float]) -> FoundRate:
    """The sweep as JSON and as a table with a bar for the loss."""
    chosen, curve = suggest(rates, losses), smoothed(losses)
    top = float(np.quantile(curve, 0.9))
    shown = sorted({round(i) for i in np.linspace(0, len(rates) - 1, min(ROWS, len(rates)))})
    rows = [(f"{rates[i]:.1e}", f"{curve[i]:.4g}", "#" * max(1, round(40 * min(1.0, curve[i] / top)))) for i in shown]
    table = aligned([(a, b, c.ljust(40)) for a, b, c in [("optim.lr", "loss", ""), *rows]])
    report = {"lr": chosen, "rates": list(rates), "losses": list(losses), "smoothed": curve.tolist()}
    return FoundRate(report, f"{table}\n\noptim.lr: {chosen:g}")
