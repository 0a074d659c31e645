"""Parameter groups by name, the optimiser over them, and gradient clipping, as mmseg does them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from segvit.engine.layers import layer_factors
from segvit.engine.schedule import learning_rate
from segvit.engine.settings import Optim, Schedule

FUSED = ("cpu", "cuda")  # devices with one kernel for the whole step of AdamW, 3 to 6 times as fast as many small ones


class Rate(NamedTuple):
    """What applies to one parameter."""

    name: str
    parameter: nn.Parameter
    lr: float
    weight_decay: float


def parameter_rates(named: Iterable[tuple[str, nn.Parameter]], optim: Optim) -> list[Rate]:
    """Learning rate and weight decay of every parameter that trains.

    Raises UserError for `layer_decay` with a model whose layers are not known.
    """
    named = list(named)
    layers = {} if optim.layer_decay is None else layer_factors((name for name, _ in named), optim.layer_decay)
    keys = sorted(sorted({*optim.lr_mult, *optim.decay_mult}), key=len, reverse=True)
    rates = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        key = next((key for key in keys if key in name), "")
        lr = optim.lr * optim.lr_mult.get(key, 1.0) * layers.get(name, 1.0)
        rates.append(Rate(name, parameter, lr, optim.weight_decay * optim.decay_mult.get(key, 1.0)))
    return rates


def make_optimizer(rates: list[Rate], optim: Optim) -> torch.optim.Optimizer:
    """One group for each pair of rate and decay, so that the library's multi-tensor kernels see long lists."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for rate in rates:
        group = groups.setdefault((rate.lr, rate.weight_decay), {"params": [], "lr": rate.lr, "initial_lr": rate.lr})
        group["weight_decay"] = rate.weight_decay
        group["params"].append(rate.parameter)
    if optim.name == "sgd":
        return torch.optim.SGD(list(groups.values()), momentum=optim.momentum)
    fused = all(rate.parameter.device.type in FUSED for rate in rates)
    return torch.optim.AdamW(list(groups.values()), betas=optim.betas, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int, steps: int) -> tuple[float, float]:
    """Set every group's learning rate for `step`; returns the lowest and the highest."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(schedule, step, base=group["initial_lr"], steps=steps)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return min(rates), max(rates)


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float | None) -> Tensor:
    """Clip the total L2 norm of the gradients in place; returns the norm before."""
    limit = float("inf") if largest is None else largest
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
