"""Image classification: train, evaluate (top-1, top-5) and use a classifier on one device, with or without an adapter.

The run folder is like that of dense training: config.yaml, env.json, metrics.jsonl, checkpoints/, model/, adapter/,
val.json. Losses that an adapter adds for masks, such as SPM's, have no place here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from segvit.adapters.files import save_adapter
from segvit.contracts import Classes, UserError
from segvit.data.decode import read_image
from segvit.data.image_folder import ImageFolder, open_image_folder
from segvit.data.prepare import prepare
from segvit.engine.freeze import freeze
from segvit.engine.run import claim, locked, write_environment
from segvit.engine.settings import Optim, Schedule, check_counts
from segvit.files import write_json
from segvit.model_folder import load_model, match_classes, save_model
from segvit.palette import generate_palette
from segvit.tasks.console import progress_bar
from segvit.tasks.labelled import EVALUATED, Whole, batches, check_views, collate, fit_labels
from segvit.tasks.sources import default_device, find_images
from segvit.zoo import adapt, create_model, find_system

if TYPE_CHECKING:
    from segvit.contracts import Model

TOP = 5


@dataclass(frozen=True, kw_only=True)
class Classification:
    """One training run of a classifier.

    `size` is the side of the square that images enter the network as; training varies them by `crop`, `flip`, `jitter`
    and `erase` as `Draws` says, evaluation takes the whole image. Raises UserError for numbers that make no run.
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
    jitter: float = 0.0
    erase: float = 0.0
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
        check_counts(self, "steps", "batch_size", "checkpoint_every", "size")
        check_views(self)
        if self.adapter_options and self.adapter is None:
            raise UserError(f"adapter_options {self.adapter_options} belong to no adapter; set adapter too")
        if (task := find_system(self.model).task) != "classify":
            does = "makes masks" if task == "dense" else "is for retrieval"
            raise UserError(f"{self.model} {does}; choose a classifier, see segvit classify train --help")


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
        fit_labels(model, run, device, partial(batches, data, run, model.spec))
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


# Measuring and using


def load_classifier(source: str, *, device: str | None = None) -> Model:
    """A classifier from a run, model or adapter folder. Raises UserError for another kind of model."""
    model = load_model(source, device=device or default_device())
    if (task := find_system(model.config.name).task) != "classify":
        does, place = ("makes masks", "val") if task == "dense" else ("is for retrieval", "retrieve val")
        raise UserError(f"{source} holds a {model.config.name}, which {does}; see segvit {place}")
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
