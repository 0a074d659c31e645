"""The overfit check: a few training images learnt by heart. What cannot learn four images will not learn a thousand.

Training and validation see the same fixed crops, so that every mistake in data, labels, loss or rates shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from segvit.contracts import Classes, Sample, UserError
from segvit.data.dataset import Dataset
from segvit.data.resize import resize_image, resize_mask, scaled_size
from segvit.data.transforms import Augment
from segvit.metrics.confusion import Metrics
from segvit.tasks.experiment import Experiment

GOAL = 0.95  # training mIoU that a working setup reaches on a handful of images


@dataclass(frozen=True)
class FewImages:
    """A few samples, kept in memory, as both the train and the val split of a dataset."""

    classes: Classes
    channels: int
    levels: tuple[float, float] | None
    samples: Sequence[Sample]

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return ("train", "val")

    def count(self, split: str) -> int:
        """The number of samples, the same in both splits."""
        return len(self.samples)

    def name(self, split: str, i: int) -> str:
        """What sample i is called."""
        return self.samples[i].name

    def read(self, split: str, i: int) -> Sample:
        """Sample i."""
        return self.samples[i]


def learn_by_heart(experiment: Experiment, dataset: Dataset) -> tuple[Experiment, Dataset]:
    """The run and the data of the check: fixed crops at the recipe's scale, no augmentation, a short warm-up.

    Without `overfit` both come back as they are. Raises UserError where there are fewer images than that.
    """
    if experiment.overfit is None:
        return experiment, dataset
    if dataset.count("train") < experiment.overfit:
        raise UserError(
            f"overfit is {experiment.overfit} but there are {dataset.count('train')} training images; lower it"
        )
    samples = [fixed_crop(dataset.read("train", i), experiment.augment) for i in range(experiment.overfit)]
    few = FewImages(dataset.classes, dataset.channels, dataset.levels, samples)
    still = Augment(
        crop=experiment.augment.crop, ratio_range=(1.0, 1.0), cat_max_ratio=1.0, flip=0.0, photometric=False
    )
    warmup = min(experiment.schedule.warmup, experiment.total_steps(few.count("train")) // 10)
    whole = replace(experiment.input, scale=None, min_side=None, exact=None, window=None, stride=None)
    return replace(
        experiment, augment=still, input=whole, schedule=replace(experiment.schedule, warmup=warmup), cache="none"
    ), few


def fixed_crop(sample: Sample, recipe: Augment) -> Sample:
    """The middle of the image at the size that ratio 1 of the recipe stands for, at most as large as the crop."""
    height, width = sample.mask.shape
    size = scaled_size((height, width), scale=recipe.scale or (height, width))
    high, wide = min(recipe.crop[0], size[0]), min(recipe.crop[1], size[1])
    top, left = (size[0] - high) // 2, (size[1] - wide) // 2
    image = resize_image(sample.image, size, window=(top, left, high, wide))
    mask = resize_mask(sample.mask, size)[top : top + high, left : left + wide]
    return sample._replace(image=image, mask=mask)


def verdict(metrics: Metrics, images: int) -> str:
    """Whether the check was passed and what that means."""
    reached = f"mIoU {metrics.miou:.4f} on the {images} images that it trained on"
    if metrics.miou >= GOAL:
        return f"overfit check passed: {reached} ({GOAL} asked); data, labels, loss and model work together"
    return (
        f"overfit check failed: {reached}, {GOAL} asked; give it more --steps or a rate from `segvit find_lr`; if that "
        "does not help, look at the labels with `segvit data preview`"
    )
