"""The training loop: one plain loop that reads from top to bottom. What varies comes in as arguments.

The loss of a step is normalised by counts of the global batch, so that one big batch, accumulation and several
processes give the same gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from segvit.contracts import Batch, UserError
from segvit.engine.freeze import train_mode
from segvit.engine.optim import clip_gradients, set_rates
from segvit.engine.settings import Schedule

Row = dict[str, Any]  # one line of metrics.jsonl


class NotFiniteError(UserError):
    """The loss is NaN or infinite; the weights are as before the step."""


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
    Raises UserError with the file names when a loss is not finite, before the weights change.
    """
    train_mode(model)
    for step in range(progress.step, procedure.steps):
        started = time.perf_counter()
        parts = [to_device(batch, accelerator.device) for batch in next(batches)]
        lr, lr_max = set_rates(optimizer, procedure.schedule, step, procedure.steps)
        totals = global_totals([procedure.normalisers(batch.masks) for batch in parts], accelerator)
        terms: dict[str, Tensor] = {}
        finite: list[Tensor] = []  # of each micro-batch; looked at once a step, since looking waits for the device
        for number, batch in enumerate(parts, start=1):
            with accelerator.no_sync(model) if number < len(parts) else nullcontext():
                out = model(batch.images)
                losses = procedure.criterion(out, batch.masks, totals)
                loss = torch.stack(list(losses.values())).sum()
                finite.append(torch.isfinite(loss))
                # Processes average their gradients; the sum over the global batch is wanted.
                accelerator.backward(loss * accelerator.num_processes)
            for name, value in losses.items():
                terms[name] = terms.get(name, torch.zeros_like(value)).detach() + value.detach()
        logged = global_terms(terms, accelerator)
        strange = [batch for batch, good in zip(parts, finite, strict=True) if not good]
        check_finite(logged, strange, step, accelerator)
        accelerator.unscale_gradients(optimizer)
        norm = clip_gradients(model.parameters(), procedure.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # After an overflow of fp16 the scaler leaves the step out; a fused optimiser does not tell accelerate.
        if average is not None and (accelerator.scaler is None or bool(norm.isfinite())):
            average.update_parameters(accelerator.unwrap_model(model))
        progress.step = step + 1
        values = {"lr": lr, "lr_max": lr_max, "grad_norm": float(norm.detach())}
        values["seconds"] = time.perf_counter() - started
        report({"step": progress.step, "loss": sum(logged.values()), **logged, **values})
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


def global_terms(terms: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    """The loss terms of a step, summed over micro-batches and processes."""
    values = torch.stack([value.to(torch.promote_types(value.dtype, torch.float32)) for value in terms.values()])
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, reduction="sum")
    return dict(zip(terms, values.tolist(), strict=True))


def check_finite(logged: dict[str, float], strange: Sequence[Batch], step: int, accelerator: Accelerator) -> None:
    """Raise UserError with the terms and the files of the `strange` micro-batches, in every process alike."""
    bad = [name for name, value in logged.items() if not math.isfinite(value)]
    if not bad:
        return
    files = [name for batch in strange for name in batch.names]
    everywhere = gather_object(files) if accelerator.num_processes > 1 else files
    raise NotFiniteError(
        f"the loss is {sum(logged.values())} at step {step + 1} ({', '.join(bad)}); the batch was "
        f"{', '.join(everywhere)}; look at these files, lower optim.lr or lengthen schedule.warmup; the last "
        "checkpoint is intact"
    )
