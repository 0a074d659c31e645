"""What a run does to a batch: the system's loss with the experiment's options bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from segvit.adapters.catalogue import LOSSES, AdapterLoss
from segvit.contracts import Dense
from segvit.data.dataset import Dataset
from segvit.engine.fit import Procedure
from segvit.tasks.balance import ClassBalance
from segvit.tasks.experiment import Experiment
from segvit.zoo import find_system

Criterion = Callable[..., dict[str, Tensor]]  # (out, masks, totals) -> weighted terms
Normalisers = Callable[[Tensor], dict[str, Tensor]]  # masks -> counts


def make_procedure(
    experiment: Experiment, dataset: Dataset, *, device: torch.device, steps: int,
    balance: ClassBalance = ClassBalance(None, None),
) -> Procedure:  # fmt: skip
    """Loss, normalisers, schedule and clipping of a run of `steps`."""
    system, classes = find_system(experiment.model), dataset.classes
    loss: dict[str, Any] = dict(experiment.loss)
    if balance.weights is not None:
        loss["class_weights"] = torch.from_numpy(balance.weights).to(device)
    criterion: Criterion = partial(system.criterion, ignore_index=classes.ignore_index, **loss)
    normalisers: Normalisers = partial(
        system.normalisers, num_classes=len(classes), ignore_index=classes.ignore_index
    )  # fmt: skip
    if experiment.adapter in LOSSES:
        own = LOSSES[experiment.adapter]
        criterion, normalisers = with_adapter_loss(criterion, normalisers, own, ignore_index=classes.ignore_index)
    return Procedure(
        criterion=criterion, normalisers=normalisers,
        schedule=experiment.schedule, steps=steps, clip=experiment.optim.clip,
    )  # fmt: skip


def with_adapter_loss(
    criterion: Criterion, normalisers: Normalisers, own: AdapterLoss, *, ignore_index: int
) -> tuple[Criterion, Normalisers]:
    """A system's criterion and normalisers with the terms of an adapter added."""

    def both_terms(out: Dense, masks: Tensor, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        return criterion(out, masks, totals) | own.losses(out, masks, totals, ignore_index=ignore_index)

    def both_counts(masks: Tensor) -> dict[str, Tensor]:
        return normalisers(masks) | own.normalisers(masks, ignore_index=ignore_index)

    return both_terms, both_counts
