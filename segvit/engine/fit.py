"""The training loop: one plain loop that reads from top to bottom. What varies comes in as arguments.

The loss of a step is normalised by counts of the global batch, so that one big batch, accumulation and several
processes give the same gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from segvit.contracts import Batch, UserError
from segvit.engine.optim import clip_gradients, set_rates
from segvit.engine.settings import Schedule

Row = dict[str, Any]  # one line of metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """What happens to a batch: the system's own functions, with their options bound."""

    criterion: Callable[..., dict[str, Tensor]]  # (out, masks, totals) -> weighted terms
    normalisers: Callable[[Tensor], dict[str, Tensor]]  # masks -> counts
    schedule: Schedule
    steps: int
    clip: float | None


@dataclass
class Progress:
    """Where the run stands."""

    step: int = 0  # steps done
    best: float = float("-inf")  # best validation mIoU
    best_step: int = 0


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Sequence[Batch]],
    *,
    procedure: Procedure,
    accelerator: Accelerator,
    progress: Progress,
    average: AveragedModel | None,
    report: Callable[[Row], None],
    after: Callable[[int], None],
) -> None:
    """Train from `progress.step` to the end; `batches` yields the micro-batches of one step of this process.

    `report` gets one row a step; `after` is called with the number of steps done, to validate and to save.
    Raises UserError with the file names when a loss is not finite.
    """
    model.train()
    for step in range(progress.step, procedure.steps):
        started = time.perf_counter()
        parts = [to_device(batch, accelerator.device) for batch in next(batches)]
        lr = set_rates(optimizer, procedure.schedule, step, procedure.steps)
        totals = global_totals([procedure.normalisers(batch.masks) for batch in parts], accelerator)
        terms: dict[str, Tensor] = {}
        for number, batch in enumerate(parts, start=1):
            with accelerator.no_sync(model) if number < len(parts) else nullcontext():
                out = model(batch.images)
                losses = procedure.criterion(out, batch.masks, totals)
                loss = torch.stack(list(losses.values())).sum()
                check_finite(loss, losses, batch, step)
                # Processes average their gradients; the sum over the global batch is wanted.
                accelerator.backward(loss * accelerator.num_processes)
            for name, value in losses.items():
                terms[name] = terms.get(name, torch.zeros_like(value)).detach() + value.detach()
        accelerator.unscale_gradients(optimizer)
        norm = clip_gradients(model.parameters(), procedure.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update_parameters(accelerator.unwrap_model(model))
        progress.step = step + 1
        report(row(progress.step, lr, norm, terms, accelerator) | {"seconds": time.perf_counter() - started})
        after(progress.step)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Images and masks where the model is."""
    images, masks = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.masks))
    return Batch(images, masks, batch.names)


def global_totals(parts: Sequence[dict[str, Tensor]], accelerator: Accelerator) -> dict[str, Tensor]:
    """Normalisers summed over micro-batches and processes."""
    totals = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
    if accelerator.num_processes == 1:
        return totals
    return {name: accelerator.reduce(value, reduction="sum") for name, value in totals.items()}


def check_finite(loss: Tensor, losses: dict[str, Tensor], batch: Batch, step: int) -> None:
    """Raise UserError with the terms and the files of a batch whose loss is NaN or infinite."""
    if torch.isfinite(loss):
        return
    bad = [name for name, value in losses.items() if not torch.isfinite(value)] or list(losses)
    raise UserError(
        f"the loss is {loss.item()} at step {step + 1} ({', '.join(bad)}); the batch was {', '.join(batch.names)}; "
        "look at these files, lower optim.lr or lengthen schedule.warmup; the last checkpoint is intact"
    )


def row(step: int, lr: float, norm: Tensor, terms: dict[str, Tensor], accelerator: Accelerator) -> Row:
    """A step's line: the loss and its terms over the global batch, the gradient's norm, the learning rate."""
    names = list(terms)
    values = torch.stack([terms[name].float() for name in names])
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, reduction="sum")
    logged = dict(zip(names, values.tolist(), strict=True))
    return {"step": step, "loss": sum(logged.values()), **logged, "lr": lr, "grad_norm": float(norm.detach())}
