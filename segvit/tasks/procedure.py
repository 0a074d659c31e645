"""What a run does to a batch: the system's loss with the experiment's options bound."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from segvit.data.dataset import Dataset
from segvit.engine.fit import Procedure
from segvit.tasks.balance import ClassBalance
from segvit.tasks.experiment import Experiment
from segvit.zoo import find_system


def make_procedure(
    experiment: Experiment, dataset: Dataset, *, device: torch.device, steps: int,
    balance: ClassBalance = ClassBalance(None, None),
) -> Procedure:  # fmt: skip
    """Loss, normalisers, schedule and clipping of a run of `steps`."""
    system, classes = find_system(experiment.model), dataset.classes
    loss: dict[str, Any] = dict(experiment.loss)
    if balance.weights is not None:
        loss["class_weights"] = torch.from_numpy(balance.weights).to(device)
    return Procedure(
        criterion=partial(system.criterion, ignore_index=classes.ignore_index, **loss),
        normalisers=partial(system.normalisers, num_classes=len(classes), ignore_index=classes.ignore_index),
        schedule=experiment.schedule, steps=steps, clip=experiment.optim.clip,
    )  # fmt: skip
