"""The training loop of few-shot networks and of their base learner: steps, history, checkpoints, exact resuming."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from segvit.contracts import UserError
from segvit.engine.optim import clip_gradients, make_optimizer, parameter_rates, set_rates
from segvit.engine.run import PREVIOUS_STATE, STATE
from segvit.engine.settings import Optim, Schedule
from segvit.engine.state import random_state, replace_state, restored
from segvit.files import write_text
from segvit.tasks.console import progress_bar


def fit_steps(
    network: nn.Module, batches: Callable[[int], Iterator[Any]], loss: Callable[[Any], dict[str, Tensor]], *,
    folder: Path, steps: int, optim: Optim, schedule: Schedule, checkpoint_every: int, resume: bool,
) -> None:  # fmt: skip
    """Train what requires a gradient, from the last checkpoint on with `resume`.

    `batches(start)` yields a tuple for each step from `start` to the end, its last item names; `loss` makes the terms
    of one. Raises UserError for a loss that is not finite.
    """
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameter_rates(named, optim), optim)
    start = restored(folder, network, optimizer) if resume else 0
    history = folder / "metrics.jsonl"
    rows = history.read_text(encoding="utf-8").splitlines(keepends=True)[:start] if history.is_file() else []
    write_text(history, "".join(rows))
    network.train()
    with history.open("a", encoding="utf-8") as file, progress_bar("training") as progress:
        for step, batch in enumerate(batches(start), start=start):
            started = time.perf_counter()
            _, lr = set_rates(optimizer, schedule, step, steps)
            terms = loss(batch)
            total = torch.stack(list(terms.values())).sum()
            if not math.isfinite(float(total.detach())):
                raise UserError(
                    f"the loss is {float(total)} at step {step + 1} ({', '.join(batch[-1])}); lower the rate"
                )
            total.backward()
            norm = float(clip_gradients([parameter for _, parameter in named], optim.clip))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row = {"step": step + 1, "loss": float(total.detach()), "lr": lr, "grad_norm": norm}
            row |= {name: float(value.detach()) for name, value in terms.items()}
            file.write(json.dumps(row | {"seconds": time.perf_counter() - started}) + "\n")
            file.flush()
            progress(step + 1, steps)
            if step + 1 == steps or (step + 1) % checkpoint_every == 0:
                state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                replace_state(folder / STATE, folder / PREVIOUS_STATE, state | {"random": random_state()})


def load_draws(draws: Any, *, batch_size: int, start: int, steps: int, workers: int) -> Iterator[Any]:
    """Batches of `draws[0]`, `draws[1]`, ... for the steps from `start` to the end."""
    numbers = [list(range(step * batch_size, (step + 1) * batch_size)) for step in range(start, steps)]
    own = torch.Generator()  # else the loader draws from the one that dropout is to find as it was saved
    return iter(DataLoader(draws, batch_sampler=numbers, num_workers=workers, generator=own))
