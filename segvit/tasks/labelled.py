"""Training on images with a label each, on one device: the draws, the loop, and how a run goes on exactly.

What classification and retrieval share. Draw d is a function of (seed, d) alone, as in `segvit.data.loading`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import DataLoader

from segvit.contracts import Batch, InputSpec, UserError
from segvit.data.image_folder import ImageFolder
from segvit.data.loading import LoadingError, permutation
from segvit.data.prepare import normalise, prepare
from segvit.data.resize import resize_image
from segvit.data.vary import erase, jitter
from segvit.engine.fit import Procedure, Progress, fit
from segvit.engine.optim import make_optimizer, parameter_rates
from segvit.engine.run import PREVIOUS_STATE, STATE
from segvit.engine.state import random_state, replace_state, restored
from segvit.files import write_text
from segvit.tasks.console import progress_bar
from segvit.zoo import find_system

if TYPE_CHECKING:
    from segvit.contracts import Model
    from segvit.tasks.classify import Classification
    from segvit.tasks.retrieve import Retrieval

    Run: TypeAlias = Classification | Retrieval

EVALUATED = 64  # images at once


def check_views(run: Run) -> None:
    """Raise UserError for shares and probabilities that are none."""
    if not 0 < run.crop[0] <= run.crop[1] <= 1:
        raise UserError(f"crop is {run.crop}; give the least and the greatest share of the short side, 0..1")
    for name, value in (("flip", run.flip), ("jitter", run.jitter), ("erase", run.erase)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}; choose one in 0..1")


@dataclass(frozen=True)
class Draws:
    """The endless sequence of training draws: image permutation(d // n)[d % n], varied by (seed, d).

    A square part, whose side is the share `crop` (least, most) of the short side, is resized to `size`, mirrored with
    probability `flip`, changed in brightness, contrast and saturation by factors in 1 +- `jitter`, and with probability
    `erase` loses a rectangle.
    """

    data: ImageFolder
    run: Run
    spec: InputSpec

    def __getitem__(self, draw: int) -> tuple[Tensor, int, str]:
        run, count = self.run, len(self.data.items("train"))
        epoch, place = divmod(draw, count)
        index = int(permutation(run.seed, epoch, count)[place])
        image, label = read(self.data, "train", index)
        rng = np.random.default_rng([run.seed, draw])
        height, width = image.shape[:2]
        side = max(1, round(rng.uniform(*run.crop) * min(height, width)))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        part = resize_image(image[top : top + side, left : left + side], (run.size, run.size))
        part = part[:, ::-1] if rng.random() < run.flip else part
        tensor = normalise(jitter(part, run.jitter, rng) if run.jitter else part, self.spec)
        if run.erase and rng.random() < run.erase:
            erase(tensor, rng)
        return tensor, label, self.data.name("train", index)


@dataclass(frozen=True)
class Whole:
    """The images of a split as they are evaluated."""

    data: ImageFolder
    split: str
    spec: InputSpec

    def __len__(self) -> int:
        return len(self.data.items(self.split))

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        image, label = read(self.data, self.split, index)
        return prepare(image, self.spec), label, self.data.name(self.split, index)


def read(data: ImageFolder, split: str, index: int) -> tuple[Any, int]:
    """An image and its class id; what the user can mend keeps its one line on the way out of a worker."""
    try:
        return data.read(split, index)
    except UserError as error:
        raise LoadingError(str(error)) from None


def collate(items: list[tuple[Tensor, int, str]]) -> Batch:
    """Images of one size as a batch whose masks are the labels (B,)."""
    images, labels, names = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), list(names))


def batches(data: ImageFolder, run: Run, spec: InputSpec, start: int) -> Iterator[Batch]:
    """The batch of each step from `start` to the end."""
    size = run.batch_size
    chosen = [list(range(step * size, (step + 1) * size)) for step in range(start, run.steps)]
    draws: Any = Draws(data, run, spec)
    own = torch.Generator()  # else the loader draws from the one that dropout is to find as it was saved
    return iter(DataLoader(draws, batch_sampler=chosen, num_workers=run.workers, collate_fn=collate, generator=own))


def fit_labels(model: Model, run: Run, device: torch.device, load: Callable[[int], Iterator[Batch]]) -> None:
    """Train to the end, from the last checkpoint on where the run is resumed; `load` gives the batches from a step."""
    folder = Path(run.out)
    optimizer = make_optimizer(parameter_rates(model.named_parameters(), run.optim), run.optim)
    start = restored(folder, model, optimizer) if run.resume else 0
    history = folder / "metrics.jsonl"
    before = history.read_text(encoding="utf-8").splitlines(keepends=True) if history.is_file() else []
    write_text(history, "".join(before[:start]))
    if start >= run.steps:
        return
    AcceleratorState._reset_state()  # another run in this process may have had another device
    accelerator = Accelerator(cpu=device.type == "cpu")
    system = find_system(run.model)
    procedure = Procedure(
        criterion=partial(system.criterion, label_smoothing=run.label_smoothing), normalisers=system.normalisers,
        schedule=run.schedule, steps=run.steps, clip=run.optim.clip,
    )  # fmt: skip

    def save(step: int) -> None:
        if step == run.steps or step % run.checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            replace_state(folder / STATE, folder / PREVIOUS_STATE, state | {"random": random_state()})

    with history.open("a", encoding="utf-8") as file, progress_bar("training") as progress:

        def report(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress(row["step"], run.steps)

        steps = ([batch] for batch in load(start))
        fit(
            model, accelerator.prepare_optimizer(optimizer), steps, procedure=procedure, accelerator=accelerator,
            progress=Progress(step=start), average=None, report=report, after=save,
        )  # fmt: skip
