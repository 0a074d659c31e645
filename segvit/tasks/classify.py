"""Image classification: train, evaluate (top-1, top-5) and use a classifier on one device, with or without an adapter.

The run folder is like that of dense training: config.yaml, env.json, metrics.jsonl, checkpoints/, model/, adapter/,
val.json. Losses that an adapter adds for masks, such as SPM's, have no place here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from segvit.adapters.files import save_adapter
from segvit.contracts import Batch, Classes, InputSpec, UserError
from segvit.data.decode import read_image
from segvit.data.image_folder import ImageFolder, open_image_folder
from segvit.data.loading import LoadingError, permutation
from segvit.data.prepare import normalise, prepare
from segvit.data.resize import resize_image
from segvit.engine.fit import Procedure, Progress, fit
from segvit.engine.freeze import freeze
from segvit.engine.optim import make_optimizer, parameter_rates
from segvit.engine.run import PREVIOUS_STATE, STATE, claim, locked, write_environment
from segvit.engine.settings import Optim, Schedule
from segvit.engine.state import random_state, replace_state
from segvit.files import write_json, write_text
from segvit.model_folder import load_model, match_classes, save_model
from segvit.palette import generate_palette
from segvit.tasks.commands import default_device, find_images
from segvit.tasks.console import progress_bar
from segvit.tasks.detect import restored
from segvit.zoo import adapt, create_model, find_system

if TYPE_CHECKING:
    from segvit.contracts import Model

TOP = 5
EVALUATED = 64  # images at once


@dataclass(frozen=True, kw_only=True)
class Classification:
    """One training run of a classifier.

    `size` is the side of the square that images enter the network as. Training cuts a square part out of each, whose
    side is the share `crop` (least, most) of the short side, and mirrors it with probability `flip`; evaluation takes
    the whole image. Raises UserError for numbers that make no run.
    """

    data: str
    out: str
    model: str = "classifier_vit_base"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    init: str | None = None
    adapter: str | None = None
    adapter_options: dict[str, Any] = field(default_factory=dict)
    steps: int
    batch_size: int = 64
    size: int = 224
    crop: tuple[float, float] = (0.6, 1.0)
    flip: float = 0.5
    label_smoothing: float = 0.0
    optim: Optim = Optim(lr=1e-3, weight_decay=1e-4, lr_mult={}, clip=5.0)
    schedule: Schedule = Schedule(kind="cosine", warmup=100)
    seed: int = 0
    device: Literal["cpu", "cuda"] | None = None
    workers: int = 2
    checkpoint_every: int = 1000
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.checkpoint_every, self.size) < 1 or self.workers < 0:
            raise UserError("steps, batch_size, checkpoint_every and size must be 1 or more, workers 0 or more")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise UserError(f"crop is {self.crop}; give the least and the greatest share of the short side, 0..1")
        if self.adapter_options and self.adapter is None:
            raise UserError(f"adapter_options {self.adapter_options} belong to no adapter; set adapter too")
        if find_system(self.model).task != "classify":
            raise UserError(f"{self.model} makes masks; choose a classifier, see segvit classify train --help")


@dataclass(frozen=True)
class Draws:
    """The endless sequence of training draws: image permutation(d // n)[d % n], cut and mirrored by (seed, d)."""

    data: ImageFolder
    run: Classification
    spec: InputSpec

    def __getitem__(self, draw: int) -> tuple[Tensor, int, str]:
        count = len(self.data.items("train"))
        epoch, place = divmod(draw, count)
        index = int(permutation(self.run.seed, epoch, count)[place])
        image, label = read(self.data, "train", index)
        rng = np.random.default_rng([self.run.seed, draw])
        height, width = image.shape[:2]
        side = max(1, round(rng.uniform(*self.run.crop) * min(height, width)))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        part = resize_image(image[top : top + side, left : left + side], (self.run.size, self.run.size))
        mirrored = rng.random() < self.run.flip
        return normalise(part[:, ::-1] if mirrored else part, self.spec), label, self.data.name("train", index)


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


def train_classifier(run: Classification) -> dict[str, Any]:
    """Train a classifier; returns its figures on the val split, {} where there is none.

    On the CPU a resumed run ends as one that was never stopped. Raises UserError for anything the user can mend.
    """
    folder, device = Path(run.out), torch.device(run.device or default_device())
    run = replace(run, data=str(Path(run.data).expanduser().resolve()))
    data = open_image_folder(run.data)
    if not data.splits.get("train"):
        raise UserError(f"{run.data} has no train folder, only {', '.join(data.splits)}; put images into train/CLASS/")
    set_seed(run.seed)
    model = build_classifier(run, data.names).to(device)
    with locked(folder):
        claim(folder, asdict(run))
        write_environment(folder)
        fit_classifier(model, data, run, device)
        save_model(model, folder / "model")
        if model.adapter is not None and run.adapter != "full":  # that would be the whole model again
            save_adapter(model, folder / "adapter", base=base_weights(run))
        if "val" not in data.splits:
            return {}
        found = accuracy(model, data, "val", workers=run.workers)
        write_json(folder / "val.json", found)
    return found


def build_classifier(run: Classification, names: tuple[str, ...]) -> Model:
    """The run's model with its input spec; pretrained, initialised from another run, tuned by an adapter."""
    options = dict(run.options) | ({} if run.weights in (None, "none") else {"weights": run.weights})
    model = create_model(run.model, classes=Classes(names, generate_palette(len(names))), **options)
    model.spec = replace(model.spec, exact=(run.size, run.size))
    if run.init is not None:
        match_classes(model, load_model(run.init))
    if run.adapter is not None:
        adapt(model, run.adapter, **run.adapter_options)
    freeze(model, run.optim.freeze)
    return model


def base_weights(run: Classification) -> str:
    """Where an adapter's loader finds the frozen weights: a hub name, an absolute path, or the run's own model."""
    source = run.init or run.weights
    if source in (None, "none"):
        return "../model"
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def fit_classifier(model: Model, data: ImageFolder, run: Classification, device: torch.device) -> None:
    """Train to the end, from the last checkpoint on where the run is resumed."""
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

        steps = ([batch] for batch in batches(data, run, model.spec, start))
        fit(
            model, accelerator.prepare_optimizer(optimizer), steps, procedure=procedure, accelerator=accelerator,
            progress=Progress(step=start), average=None, report=report, after=save,
        )  # fmt: skip


def batches(data: ImageFolder, run: Classification, spec: InputSpec, start: int) -> Iterator[Batch]:
    """The batch of each step from `start` to the end."""
    size = run.batch_size
    chosen = [list(range(step * size, (step + 1) * size)) for step in range(start, run.steps)]
    draws: Any = Draws(data, run, spec)
    own = torch.Generator()  # else the loader draws from the one that dropout is to find as it was saved
    return iter(DataLoader(draws, batch_sampler=chosen, num_workers=run.workers, collate_fn=collate, generator=own))


# Measuring and using


def load_classifier(source: str, *, device: str | None = None) -> Model:
    """A classifier from a run, model or adapter folder. Raises UserError for a model that makes masks."""
    model = load_model(source, device=device or default_device())
    if find_system(model.config.name).task != "classify":
        raise UserError(f"{source} holds a {model.config.name}, which makes masks; see segvit val and segvit predict")
    return model


@torch.inference_mode()
def scores(model: Model, images: Tensor) -> Tensor:
    """Probabilities (B, K) of normalised images, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    return torch.as_tensor(model(images.to(device)).logits).flatten(1).float().softmax(1).cpu()


def accuracy(model: Model, data: ImageFolder, split: str, *, workers: int = 0) -> dict[str, Any]:
    """Top-1 over all images, that of each class (its recall), and top-5 where there are more than 5 classes."""
    if model.classes.names != data.names:
        raise UserError(f"the model knows {list(model.classes.names[:5])} and the data has {list(data.names[:5])}")
    whole: Any = Whole(data, split, model.spec)
    depth = min(TOP, len(data.names))
    hits = np.zeros((len(data.names), depth), np.int64)  # images of a class that are found at place 1 ... depth
    counts = np.bincount([label for _, label in data.items(split)], minlength=len(data.names))
    with progress_bar("evaluating") as progress:
        loader = DataLoader(
            whole, EVALUATED, num_workers=workers, collate_fn=collate, generator=torch.Generator()
        )  # fmt: skip
        for number, batch in enumerate(loader):
            best = scores(model, batch.images).topk(depth).indices
            rows, places = np.nonzero((best == batch.masks[:, None]).numpy())
            np.add.at(hits, (batch.masks.numpy()[rows], places), 1)
            progress(min((number + 1) * EVALUATED, len(whole)), len(whole))
    each = {
        name: float(hits[i, 0] / counts[i]) if counts[i] else None for i, name in enumerate(data.names)
    }  # fmt: skip
    found = {"top1": float(hits[:, 0].sum() / counts.sum())}
    found |= {"top5": float(hits.sum() / counts.sum())} if len(data.names) > TOP else {}
    return {**found, "classes": each, "images": int(counts.sum()), "split": split}


def classify_files(
    source: str, model: str, *, top: int = 1, device: str | None = None, done: Callable[[int, int], None]
) -> list[dict[str, Any]]:  # fmt: skip
    """The `top` most probable classes of each image, the surest first. Raises UserError for a file that is no image."""
    network = load_classifier(model, device=device)
    names, rows = network.classes.names, []
    paths = list(find_images(source))
    for number, path in enumerate(paths):
        image = prepare(read_image(path, channels=network.spec.channels), network.spec)
        best = scores(network, image[None])[0].topk(min(top, len(names)))
        classes = [
            {"class": names[i], "score": round(score, 4)}
            for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        rows.append({"image": str(path), "classes": classes})
        done(number + 1, len(paths))
    return rows
