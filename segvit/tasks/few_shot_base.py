"""The first phase of BAM: a PSPNet learns the base classes of a fold; backbone and head then serve few-shot networks.

Source    C. Lang et al., CVPR 2022, section 3.2; rates, crop and scales of chunbolang/BAM.
Differs   episodes' rotation and blur are added to the scales and mirroring, and the whole image is scaled as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from segvit.backbones.deep_stem import DeepStemResNet, deep_stem_resnet
from segvit.contracts import Classes, Dense, Readout, Sample, UserError
from segvit.data.dataset import Dataset, open_dataset
from segvit.data.episodes import MIN_PIXELS, Fold, base_mask, chosen_fold, distort, find_objects, located_folds
from segvit.data.prepare import normalise
from segvit.engine.evaluate import evaluate
from segvit.engine.run import claim, locked, write_environment
from segvit.engine.settings import Optim, Schedule, check_counts
from segvit.files import write_json
from segvit.inference.predictor import Predictor
from segvit.losses.cross_entropy import pixel_cross_entropy
from segvit.nn.readout import logit_rows
from segvit.systems.few_shot import BaseLearner, resize, size_of
from segvit.tasks.console import progress_bar
from segvit.tasks.dense import located
from segvit.tasks.few_shot_loop import fit_steps, load_draws
from segvit.tasks.few_shot_models import BASE_KIND, SPEC, save_few_shot
from segvit.tasks.sources import default_device

SCALES = (0.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class BaseLearning:
    """The run of one base learner; the rate is the backbone's, the head's is ten times that (BAM's recipe).

    Raises UserError for numbers that make no run.
    """

    data: str
    out: str
    folds: str = "pascal"
    fold: int = 0
    backbone: str = "resnet50"
    hidden: int = 512
    weights: str | None = None
    keep_novel: bool = False
    min_pixels: int = MIN_PIXELS
    size: int = 417
    steps: int
    batch_size: int = 12
    optim: Optim = Optim(name="sgd", lr=2.5e-4, weight_decay=1e-4, lr_mult={"head": 10.0}, decay_mult={}, clip=None)
    schedule: Schedule = Schedule(power=0.9, warmup=0)
    seed: int = 0
    device: Literal["cpu", "cuda"] | None = None
    workers: int = 2
    checkpoint_every: int = 1000
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "steps", "checkpoint_every", "hidden", "min_pixels")
        if self.batch_size < 2:
            raise UserError(f"batch_size is {self.batch_size}; the norms over 1 x 1 cells need 2 or more")
        if self.size < 33:
            raise UserError(f"size is {self.size}; give 33 or more, best 8 n + 1 such as 417")


class PSPNet(nn.Module):
    """Backbone and base learner as a dense model: images (B, 3, H, W) -> logits (B, 1 + N, H, W)."""

    def __init__(self, backbone: DeepStemResNet, classes: int, *, hidden: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, BaseLearner(backbone.dims[-1], classes, hidden=hidden)

    def forward(self, images: Tensor) -> Dense:
        size = size_of(images)
        return Dense(resize(self.head(self.backbone(images)[-1]), size), {}, size)


class BaseClasses:
    """A dataset whose masks hold background, then the base classes of a fold."""

    def __init__(self, dataset: Dataset, fold: Fold) -> None:
        self.dataset, self.fold = dataset, fold
        names, colors = dataset.classes.names, dataset.classes.palette
        self.classes = Classes(
            ("background", *(names[label] for label in fold.base)), ((0, 0, 0), *(colors[label] for label in fold.base))
        )
        self.splits, self.channels, self.levels = dataset.splits, dataset.channels, dataset.levels

    def count(self, split: str) -> int:
        """The number of samples in a split."""
        return self.dataset.count(split)

    def name(self, split: str, i: int) -> str:
        """What sample i is called."""
        return self.dataset.name(split, i)

    def read(self, split: str, i: int) -> Sample:
        """Sample i."""
        sample = self.dataset.read(split, i)
        return sample._replace(mask=base_mask(sample.mask, self.fold.base, self.dataset.classes.ignore_index))


class Crops:
    """Picture n of training: image, mask and name. Images come in a new order each round."""

    def __init__(self, dataset: BaseClasses, images: list[int], *, size: int, seed: int) -> None:
        self.dataset, self.images, self.size, self.seed = dataset, images, size, seed

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, str]:
        round_, place = divmod(number, len(self.images))
        order = np.random.default_rng([self.seed, round_, 3]).permutation(len(self.images))
        rng = np.random.default_rng([self.seed, number, 4])
        sample = distort(self.dataset.read("train", self.images[order[place]]), self.size, rng, scale=SCALES)
        return normalise(sample.image, SPEC), torch.from_numpy(np.ascontiguousarray(sample.mask)), sample.name


def learn_base(run: BaseLearning) -> dict[str, Any]:
    """Train a base learner; returns the IoU of its classes on val as `segvit val` measures it, {} without a val split.

    Training leaves out images that show novel classes unless `keep_novel`, where they are background. Raises UserError
    for anything the user can mend.
    """
    folder, device = Path(run.out), torch.device(run.device or default_device())
    run = replace(run, data=located(run.data), folds=located_folds(run.folds))
    dataset = open_dataset(run.data)
    fold = chosen_fold(run.folds, run.fold, dataset)
    without = () if run.keep_novel else fold.novel
    objects = find_objects(dataset, "train", fold.base, min_pixels=run.min_pixels, without=without)
    images = sorted({image for shown in objects.values() for image in shown})
    if not images:
        raise UserError(f"no training image shows a base class of fold {run.fold}; lower min_pixels or keep_novel")
    crops = Crops(BaseClasses(dataset, fold), images, size=run.size, seed=run.seed)
    set_seed(run.seed)
    network = PSPNet(deep_stem_resnet(run.backbone, weights=run.weights), len(fold.base), hidden=run.hidden).to(device)

    def batches(start: int) -> Iterator[Any]:
        return load_draws(crops, batch_size=run.batch_size, start=start, steps=run.steps, workers=run.workers)

    def loss(batch: Any) -> dict[str, Tensor]:
        pictures, masks = batch[0].to(device), batch[1].to(device)
        logits = network(pictures).logits.float()
        return {"loss_ce": pixel_cross_entropy(logits, masks, total=(masks != 255).sum(), ignore_index=255)}

    with locked(folder):
        claim(folder, asdict(run))
        write_environment(folder)
        fit_steps(network, batches, loss, folder=folder, steps=run.steps, optim=run.optim, schedule=run.schedule,
                  checkpoint_every=run.checkpoint_every, resume=run.resume)  # fmt: skip
        config = {"backbone": run.backbone, "hidden": run.hidden, "base": list(fold.base)}
        save_few_shot(network, config, folder / "model", kind=BASE_KIND)
        if "val" not in dataset.splits:
            return {}
        found = base_figures(network, crops.dataset, device)
        write_json(folder / "val.json", found)
    return found


def base_figures(network: PSPNet, dataset: BaseClasses, device: torch.device) -> dict[str, Any]:
    """mIoU over background and base classes on val, and the IoU of each, as fractions."""
    model: Any = network.eval()
    model.spec, model.classes, model.readout = SPEC, dataset.classes, Readout(logit_rows)
    with progress_bar("evaluating") as progress:
        found = evaluate(Predictor(model, device=device), dataset, "val", progress=progress).confusion.metrics()
    return {"miou": found.miou, "classes": dict(zip(dataset.classes.names, map(float, found.iou), strict=True))}
