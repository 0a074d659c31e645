"""Image retrieval: train FRPT on some classes, measure Recall@K on others, on one device.

The run folder is like that of classification: config.yaml, env.json, metrics.jsonl, checkpoints/, model/, val.json.
What is measured and searched are embeddings; those of a classifier, what its head reads, are the frozen baseline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from segvit.adapters.files import copy_backbone
from segvit.contracts import Classes, InputSpec, UserError
from segvit.data.decode import read_image
from segvit.data.image_folder import ImageFolder, open_image_folder
from segvit.data.prepare import prepare
from segvit.engine.freeze import freeze
from segvit.engine.run import claim, locked, write_environment
from segvit.engine.settings import Optim, Schedule, check_counts
from segvit.files import write_json
from segvit.metrics.retrieval import measured, recall_at_k
from segvit.model_folder import load_model, save_model
from segvit.palette import generate_palette
from segvit.tasks.console import progress_bar
from segvit.tasks.labelled import EVALUATED, batches, check_views, fit_labels
from segvit.tasks.sources import default_device
from segvit.zoo import create_model, find_system

if TYPE_CHECKING:
    from segvit.contracts import Model

KS = (1, 2, 4, 8)  # of CUB-200-2011, Cars-196 and FGVC-Aircraft


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """One training run of FRPT on the classes of train.

    The frozen backbone comes from `weights` or from the model of another run, `init`. `size`, `crop`, `flip`, `jitter`
    and `erase` are those of `Draws`; a crop of 0.875 is the paper's 224 pixels of 256. Raises UserError for numbers
    that make no run, and for a backbone that would stay random unless `weights` is "none".
    """

    data: str
    out: str
    model: str = "frpt_resnet50"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    init: str | None = None
    steps: int
    batch_size: int = 32
    size: int = 224
    crop: tuple[float, float] = (0.875, 0.875)
    flip: float = 0.5
    jitter: float = 0.0
    erase: float = 0.0
    label_smoothing: float = 0.0
    optim: Optim = Optim(lr=1e-3, weight_decay=1e-4, lr_mult={}, decay_mult={}, clip=5.0)
    schedule: Schedule = Schedule(kind="cosine", warmup=100)
    seed: int = 0
    device: Literal["cpu", "cuda"] | None = None
    workers: int = 2
    checkpoint_every: int = 1000
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "steps", "checkpoint_every", "size")
        if self.batch_size < 2:
            raise UserError(f"batch_size is {self.batch_size}; give 2 or more, the released head has a batch norm")
        check_views(self)
        if find_system(self.model).task != "retrieve":
            raise UserError(f"{self.model} is not for retrieval; choose one of segvit retrieve train --help")
        if (self.weights is None) == (self.init is None):
            raise UserError(
                "the backbone never trains: give its weights or a run to init it from, exactly one (none for a random "
                "one)"
            )


def train_retriever(run: Retrieval) -> dict[str, Any]:
    """Train FRPT; returns its figures on the test split (val where there is no test), {} where there is neither.

    On the CPU a resumed run ends as one that was never stopped. Raises UserError for anything the user can mend.
    """
    folder, device = Path(run.out), torch.device(run.device or default_device())
    run = replace(run, data=str(Path(run.data).expanduser().resolve()))
    data = open_image_folder(run.data, own_classes=True)
    if "train" not in data.splits:
        raise UserError(f"{run.data} has no train folder, only {', '.join(data.splits)}; put images into train/CLASS/")
    split = next((split for split in ("test", "val") if split in data.splits), None)
    if split is not None:
        check_pairs(data, split)  # before hours of training
    set_seed(run.seed)
    model = build_retriever(run, data.classes("train")).to(device)
    with locked(folder):
        claim(folder, asdict(run))
        write_environment(folder)
        fit_labels(model, run, device, partial(batches, data, run, model.spec))
        save_model(model, folder / "model")
        if split is None:
            return {}
        found = retrieval_figures(model, data, split, workers=run.workers)
        write_json(folder / "val.json", found)
    return found


def build_retriever(run: Retrieval, names: tuple[str, ...]) -> Model:
    """The run's model with its input spec and its frozen backbone."""
    options = dict(run.options) | ({} if run.weights in (None, "none") else {"weights": run.weights})
    model = create_model(run.model, classes=Classes(names, generate_palette(len(names))), **options)
    if run.init is not None:
        source = load_model(run.init)
        copy_backbone(source, model)
        model.spec = replace(model.spec, mean=source.spec.mean, std=source.spec.std)
    model.spec = replace(model.spec, exact=(run.size, run.size))
    freeze(model, run.optim.freeze)
    return model


def check_pairs(data: ImageFolder, split: str) -> None:
    """Raise UserError for a class of a split with one image: nothing else could be found for it."""
    counts = Counter(label for _, label in data.items(split))
    lonely = [data.names[label] for label, count in counts.items() if count < 2]
    if lonely:
        raise UserError(
            f"{data.root / split / lonely[0]}: one image ({len(lonely)} such classes), so that no other of it can be "
            "found; add images or take the folder out"
        )


# Measuring


def load_retriever(source: str, *, device: str | None = None) -> Model:
    """A retrieval model, or a classifier as a baseline, from a folder. Raises UserError for one that makes masks."""
    model = load_model(source, device=device or default_device())
    if find_system(model.config.name).task == "dense":
        raise UserError(f"{source} holds a {model.config.name}, which makes masks; give a run of segvit retrieve train")
    return model


@torch.inference_mode()
def embed(model: Model, images: Tensor) -> Tensor:
    """Embeddings (B, C) of normalised images, on the CPU: FRPT's, or what the head of a classifier reads."""
    network: Any = model.eval()
    images = images.to(next(model.parameters()).device)
    if find_system(model.config.name).task == "classify":
        found = network.pool(network.backbone(images))
    else:
        found = network(images).extras["embedding"]
    return torch.as_tensor(found).float().cpu()


@dataclass(frozen=True)
class Files:
    """Image files as network input; for one that cannot be read, what is wrong with it."""

    paths: Sequence[Path]
    spec: InputSpec

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            image = read_image(self.paths[index], channels=self.spec.channels, levels=self.spec.levels)
        except UserError as error:
            return str(error)
        return prepare(image, self.spec)


class Embedded(NamedTuple):
    """Embeddings (N, C) of length 1, the places of their files in the list, and why others are missing."""

    vectors: NDArray[np.float32]
    kept: list[int]
    failed: list[str]


def embed_files(model: Model, paths: Sequence[Path], *, workers: int = 0) -> Embedded:
    """Embed image files. Raises UserError for an embedding without a direction, and where no file can be read."""
    files: Any = Files(paths, model.spec)
    size = EVALUATED if model.spec.exact else 1  # else images have sizes of their own
    loader = DataLoader(files, size, num_workers=workers, collate_fn=list, generator=torch.Generator())
    parts: list[Tensor] = []
    kept: list[int] = []
    failed: list[str] = []
    with progress_bar("embedding") as progress:
        for number, items in enumerate(loader):
            good = [place for place, item in enumerate(items) if isinstance(item, Tensor)]
            failed += [item for item in items if isinstance(item, str)]
            kept += [number * size + place for place in good]
            parts += [embed(model, torch.stack([items[place] for place in good]))] if good else []
            progress(len(kept) + len(failed), len(files))
    if not kept:
        raise UserError(f"none of {len(failed)} images can be read: {'; '.join(failed[:3])}")
    vectors = torch.cat(parts).numpy()
    lengths, bad = measured(vectors)
    if len(bad):
        raise UserError(
            f"{paths[kept[bad[0]]]}: its embedding has length {lengths[bad[0], 0]} ({len(bad)} like it), so that it "
            "has no direction to compare; train again with a lower rate"
        )
    return Embedded((vectors / lengths).astype(np.float32), kept, failed)


def retrieval_figures(
    model: Model, data: ImageFolder, split: str, *, ks: Sequence[int] | None = None, workers: int = 0
) -> dict[str, Any]:
    """Recall@K of a split whose images search each other; `ks` None = those of 1, 2, 4, 8 that there are images for.

    Raises UserError for a class with one image, a file that cannot be read, and a K without so many images to find.
    """
    check_pairs(data, split)
    paths, labels = zip(*data.items(split), strict=True)
    found = embed_files(model, paths, workers=workers)
    if found.failed:
        raise UserError(found.failed[0])
    chosen = [k for k in KS if k < len(paths)] if ks is None else ks
    recall = recall_at_k(found.vectors, np.array(labels), ks=chosen)
    figures = {f"recall_at_{k}": value for k, value in recall.items()}
    return {**figures, "images": len(paths), "classes": len(data.classes(split)), "split": split}
