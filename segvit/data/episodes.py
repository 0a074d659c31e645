"""Episodes of few-shot segmentation: folds of classes, which images show which class, and the draws.

An episode is a query image, a class, and K other images (supports) that show the class; masks become 1 for the class, 0
for all else, the ignore id stays. Classes of training (base) and of the test (novel) are disjoint.

Sources   PASCAL-5i (Shaban et al., 2017) and COCO-20i (Nguyen and Todorovic, 2019) with ids from 1 and background 0;
          sampling and pictures as PFENet and BAM. Rotation, blur and flip are theirs up to the library that does them.
Fold file YAML with the novel classes of each fold, by name or id. Base are the classes of the other folds; what no
          fold lists is never the object of an episode, such as the background:

              folds:
                - [cat, dog]
                - [car, bus]

Shapes    H W pixels of an image.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from segvit.contracts import Classes, Sample, UserError
from segvit.data.dataset import Dataset
from segvit.data.resize import resize_image, resize_mask

MIN_PIXELS = 2048  # of a class in an image: 2 * 32 * 32
BENCHMARKS = ("pascal", "coco_fwb", "coco_panet")
MEAN = (124, 116, 104)  # what a crop is filled with: ImageNet's mean colour
ROTATION, BLUR = 10.0, 1.1  # degrees at most; the standard deviation of a 5x5 Gaussian


class Fold(NamedTuple):
    """Class ids in increasing order."""

    base: tuple[int, ...]
    novel: tuple[int, ...]


class Episode(NamedTuple):
    """Image numbers of a split, and the class id that it is about."""

    query: int
    label: int
    supports: tuple[int, ...]


def benchmark_folds(name: str) -> tuple[Fold, ...]:
    """The four folds of `pascal` (5i), `coco_fwb` (20i, every fourth class) or `coco_panet` (20 in a row)."""
    count = 20 if name == "pascal" else 80
    size = count // 4
    if name == "coco_fwb":
        return folds_of([tuple(range(i + 1, count + 1, 4)) for i in range(4)])
    if name not in BENCHMARKS:
        raise UserError(f"unknown folds {name!r}; choose from {', '.join(BENCHMARKS)} or give a fold file")
    return folds_of([tuple(range(i * size + 1, (i + 1) * size + 1)) for i in range(4)])


def folds_of(groups: Sequence[tuple[int, ...]]) -> tuple[Fold, ...]:
    """One fold for each group of novel classes, with all other groups as its base."""
    listed = {label for group in groups for label in group}
    return tuple(Fold(tuple(sorted(listed - set(group))), tuple(sorted(group))) for group in groups)


def open_folds(source: str, classes: Classes) -> tuple[Fold, ...]:
    """The folds of a benchmark or a fold file. Raises UserError where they do not fit the classes."""
    folds = benchmark_folds(source) if source in BENCHMARKS else read_folds(Path(source), classes)
    largest = max(max(fold.base + fold.novel) for fold in folds)
    if largest >= len(classes):
        raise UserError(
            f"{source} has class id {largest}, the data only 0..{len(classes) - 1}; ids of the benchmarks start at 1, "
            "and 0 must be the background"
        )
    return folds


def read_folds(path: Path, classes: Classes) -> tuple[Fold, ...]:
    """The folds of a YAML file. Raises UserError when it is none or a class is unknown or listed twice."""
    if not path.is_file():
        raise UserError(f"{path}: no such fold file; choose from {', '.join(BENCHMARKS)} or give a YAML file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())[:150]})") from None
    rows = data.get("folds") if isinstance(data, dict) else None
    if not isinstance(rows, list) or len(rows) < 2 or not all(isinstance(row, list) and row for row in rows):
        raise UserError(f"{path} needs `folds:` with two or more lists of classes, one a fold")
    groups = [tuple(_class_id(value, classes, path) for value in row) for row in rows]
    flat = [label for group in groups for label in group]
    twice = sorted({label for label in flat if flat.count(label) > 1})
    if twice:
        raise UserError(f"{path} lists {classes.names[twice[0]]!r} twice; a class is novel in one fold only")
    return folds_of(groups)


def _class_id(value: Any, classes: Classes, path: Path) -> int:
    if value in classes.names:
        return classes.names.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes):
        return value
    raise UserError(f"{path}: {value!r} is no class of the data; use names or ids, such as {classes.names[-1]!r}")


def find_objects(
    dataset: Dataset, split: str, labels: Collection[int], *, min_pixels: int = MIN_PIXELS,
    without: Collection[int] = (),
) -> dict[int, tuple[int, ...]]:  # fmt: skip
    """The images of a split that show at least `min_pixels` of each class; all masks are read.

    Images with any pixel of a class in `without` are left out: for training the novel ones, as BAM and SVF do.
    """
    found: dict[int, list[int]] = {label: [] for label in labels}
    for i in range(dataset.count(split)):
        ids, counts = np.unique(dataset.read(split, i).mask, return_counts=True)
        pixels = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        if not any(label in pixels for label in without):
            for label, images in found.items():
                if pixels.get(label, 0) >= min_pixels:
                    images.append(i)
    return {label: tuple(images) for label, images in found.items()}


@dataclass(frozen=True)
class Episodes:
    """The endless sequence of episodes of a split; episode n depends on `seed` and n alone.

    `objects` are the images of each class. Queries come in order, or with `shuffle` as a new permutation each round.
    Raises UserError for a class that has too few images for one query and `shots` supports.
    """

    dataset: Dataset
    split: str
    objects: dict[int, tuple[int, ...]]
    shots: int = 1
    seed: int = 0
    shuffle: bool = False

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise UserError(f"shots is {self.shots}; an episode needs 1 support or more")
        for label, images in self.objects.items():
            if len(images) <= self.shots:
                raise UserError(
                    f"class {self.dataset.classes.names[label]!r} (id {label}) has {len(images)} usable images in "
                    f"{self.split}; a query and {self.shots} supports need {self.shots + 1}: add images, lower "
                    "min_pixels or take it out of the folds"
                )

    @property
    def queries(self) -> tuple[int, ...]:
        """All images that show a class."""
        return tuple(sorted({image for images in self.objects.values() for image in images}))

    def draw(self, number: int) -> Episode:
        """Episode `number`: a class of its query and supports other than it, all uniform."""
        queries = self.queries
        round_, place = divmod(number, len(queries))
        if self.shuffle:
            place = int(np.random.default_rng([self.seed, round_, 0]).permutation(len(queries))[place])
        query, rng = queries[place], np.random.default_rng([self.seed, number, 1])
        label = int(rng.choice([label for label, images in self.objects.items() if query in images]))
        others = [image for image in self.objects[label] if image != query]
        return Episode(query, label, tuple(map(int, rng.choice(others, self.shots, replace=False))))

    def read(self, episode: Episode) -> list[Sample]:
        """The query and the supports with binary masks. Raises UserError where a support is a copy of the query."""
        found = [self.dataset.read(self.split, i) for i in (episode.query, *episode.supports)]
        for support in found[1:]:
            check_support(found[0], support)
        ignore = self.dataset.classes.ignore_index
        return [sample._replace(mask=binary(sample.mask, episode.label, ignore)) for sample in found]


def check_support(query: Sample, support: Sample) -> None:
    """Raises UserError if both are the same picture: its mask would be the answer."""
    if np.array_equal(query.image, support.image):
        raise UserError(f"support {support.name} equals the query {query.name}; use different images, remove the copy")


def binary(mask: NDArray[Any], label: int, ignore: int) -> NDArray[np.uint8]:
    """1 for the class, 255 where ignored, else 0."""
    return np.where(mask == ignore, 255, mask == label).astype(np.uint8)


def fit(sample: Sample, side: int) -> Sample:
    """For the test: the long side becomes `side`, both sides rounded down to multiples of 8, black at right and below.

    The official way; the rounding changes the scale slightly.
    """
    height, width = sample.mask.shape
    scale = side / max(height, width)
    size = (max(int(height * scale) // 8 * 8, 8), max(int(width * scale) // 8 * 8, 8))
    image, mask = resize_image(sample.image, size), resize_mask(sample.mask, size)
    room = [(0, side - size[0]), (0, side - size[1])]
    return sample._replace(image=np.pad(image, [*room, (0, 0)]), mask=np.pad(mask, room, constant_values=255))


def distort(sample: Sample, side: int, rng: np.random.Generator, *, scale: tuple[float, float] = (0.9, 1.1)) -> Sample:
    """For training: random scale, rotation, blur, mirroring and crop to `side` pixels, padded with mean and 255."""
    height, width = sample.mask.shape
    factor = rng.uniform(*scale)
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    image, mask = (Image.fromarray(resize(array, size)) for resize, array in
                   ((resize_image, sample.image), (resize_mask, sample.mask)))  # fmt: skip
    if rng.random() < 0.5:
        angle = rng.uniform(-ROTATION, ROTATION)
        image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=MEAN)
        mask = mask.rotate(angle, Image.Resampling.NEAREST, fillcolor=255)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(BLUR))
    pixels, labels = np.asarray(image), np.asarray(mask)
    if rng.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    top, left = (int(rng.integers(max(extent - side, 0) + 1)) for extent in size)
    pixels, labels = (array[top : top + side, left : left + side] for array in (pixels, labels))
    canvas = np.full((side, side, 3), MEAN, np.uint8)
    padded = np.full((side, side), 255, np.uint8)
    canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
    padded[: labels.shape[0], : labels.shape[1]] = labels
    return sample._replace(image=canvas, mask=padded)
