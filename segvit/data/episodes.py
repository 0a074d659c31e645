"""Episodes of few-shot segmentation: folds of classes, which images show which class, and the draws.

An episode is a query image, a class, and K other images (supports) that show the class; masks become 1 for the class, 0
for all else, the ignore id stays. Classes of training (base) and of the test (novel) are disjoint.

Sources   PASCAL-5i (Shaban et al., 2017) and COCO-20i (Nguyen and Todorovic, 2019) with ids from 1 and background 0;
          sampling and pictures as PFENet and BAM. Rotation, blur and flip are theirs up to the library that does them.
Fold file YAML with the novel classes of each fold, by name or id. Base are the classes of the other folds, or those
          that the fold names itself; what no fold lists is never the object of an episode, such as the background:

              folds:                     or        folds:
                - [cat, dog]                         - novel: [cat, dog]
                - [car, bus]                           base: [car, bus, horse]

          or a text file (.txt) with a line of novel classes for each fold, separated by commas.

Shapes    H W pixels of an image.
"""

from __future__ import annotations

import hashlib
import zipfile
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from segvit.contracts import Classes, Sample, UserError
from segvit.data.cache import Disk
from segvit.data.dataset import Dataset, FolderDataset
from segvit.data.decode import read_mask
from segvit.data.resize import resize_image, resize_mask
from segvit.files import cache_folder, open_atomic

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


def chosen_fold(folds: str, number: int, dataset: Dataset) -> Fold:
    """One fold of a benchmark or a fold file. Raises UserError when it has no such fold."""
    known = open_folds(folds, dataset.classes)
    if not 0 <= number < len(known):
        raise UserError(f"{folds} has folds 0..{len(known) - 1}, not {number}")
    return known[number]


def located_folds(folds: str) -> str:
    """The name of a benchmark, or the fold file's absolute path, so that a run can be used from anywhere."""
    return folds if folds in BENCHMARKS else str(Path(folds).absolute())


def read_folds(path: Path, classes: Classes) -> tuple[Fold, ...]:
    """The folds of a fold file. Raises UserError when it is none, and for classes that are unknown or in two places."""
    if not path.is_file():
        raise UserError(f"{path}: no such fold file; choose from {', '.join(BENCHMARKS)} or give a YAML or text file")
    try:
        text = path.read_text(encoding="utf-8")
        data = _lines(text) if path.suffix.lower() == ".txt" else yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())[:150]})") from None
    rows = data.get("folds") if isinstance(data, dict) else None
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        return tuple(_whole_fold(row, classes, path) for row in rows)
    if not isinstance(rows, list) or len(rows) < 2 or not all(isinstance(row, list) and row for row in rows):
        raise UserError(
            f"{path} needs `folds:` with two or more lists of novel classes, or with `novel` and `base` for each"
        )
    groups = [tuple(_class_id(value, classes, path) for value in row) for row in rows]
    _check_once(path, [label for group in groups for label in group], classes)
    return folds_of(groups)


def _lines(text: str) -> dict[str, Any]:
    """What a text file says, as YAML would."""
    rows = [[name.strip() for name in line.split(",") if name.strip()] for line in text.splitlines()]
    return {"folds": [[int(name) if name.isdigit() else name for name in row] for row in rows if row]}


def _whole_fold(row: dict[str, Any], classes: Classes, path: Path) -> Fold:
    parts = [row.get("base"), row.get("novel")]
    if row.keys() != {"base", "novel"} or not all(isinstance(part, list) and part for part in parts):
        raise UserError(f"{path}: a fold has the lists `novel` and `base` and nothing else, got {', '.join(row)}")
    base, novel = ([_class_id(value, classes, path) for value in part] for part in parts if part)
    _check_once(path, base + novel, classes)
    return Fold(tuple(sorted(base)), tuple(sorted(novel)))


def _check_once(path: Path, labels: list[int], classes: Classes) -> None:
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(
            f"{path} lists {classes.names[twice[0]]!r} twice; a class is novel in one fold only, not base there"
        )


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
    """The images of a split that show at least `min_pixels` of each class.

    Images with any pixel of a class in `without` are left out: for training the novel ones, as BAM and SVF do.
    """
    pixels = count_pixels(dataset, split)
    clean = (pixels[:, list(without)] == 0).all(1)
    return {label: tuple(np.flatnonzero(clean & (pixels[:, label] >= min_pixels)).tolist()) for label in labels}


def count_pixels(dataset: Dataset, split: str) -> NDArray[np.int64]:
    """Pixels of each class in each image of a split, (images, classes).

    All masks are read once; what is found stays in the cache folder, under a digest of what the masks depend on, so
    that a changed, new or missing file is seen. Generated images are read each time.
    """
    if not isinstance(dataset, FolderDataset):
        return _counted(dataset, split)
    store, digest = Disk(dataset, cache_folder()), hashlib.blake2b(f"{len(dataset.classes)}".encode(), digest_size=20)
    try:
        digest.update("".join(store.path(split, i).stem for i in range(dataset.count(split))).encode())
    except FileNotFoundError:
        return _counted(dataset, split)  # which says what is missing
    path = cache_folder() / "pixels" / f"{digest.hexdigest()}.npz"
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # NumPy leaves a file open that it cannot read
            stored: NDArray[np.int64] = arrays["pixels"]
        return stored
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none yet, or cut short
        pixels = _counted(dataset, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as target:
        np.savez_compressed(target, pixels=pixels)
    return pixels


def _counted(dataset: Dataset, split: str) -> NDArray[np.int64]:
    count, width = dataset.count(split), len(dataset.classes)
    pixels = np.zeros((count, width), np.int64)
    for i in range(count):
        if isinstance(dataset, FolderDataset):  # the images take most of the time and are not needed
            mask = read_mask(dataset.mask_path(split, i), dataset.rule)
        else:
            mask = dataset.read(split, i).mask
        pixels[i] = np.bincount(mask.ravel(), minlength=width)[:width]
    return pixels


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

    @cached_property
    def shown(self) -> dict[int, list[int]]:
        """The classes that each query shows, by image."""
        found: dict[int, list[int]] = {}
        for label, images in self.objects.items():
            for image in images:
                found.setdefault(image, []).append(label)
        return dict(sorted(found.items()))

    @cached_property
    def queries(self) -> tuple[int, ...]:
        """All images that show a class."""
        return tuple(self.shown)

    def draw(self, number: int) -> Episode:
        """Episode `number`: a class of its query and supports other than it, all uniform."""
        round_, place = divmod(number, len(self.queries))
        if self.shuffle:
            place = _order(self.seed, round_, len(self.queries))[place]
        query, rng = self.queries[place], np.random.default_rng([self.seed, number, 1])
        label = int(rng.choice(self.shown[query]))
        images = self.objects[label]
        own = bisect_left(images, query)
        others = rng.choice(len(images) - 1, self.shots, replace=False)
        return Episode(query, label, tuple(images[i + int(i >= own)] for i in others.tolist()))

    def samples(self, episode: Episode) -> list[Sample]:
        """The query and the supports with all classes. Raises UserError where a support is a copy of the query."""
        found = [self.dataset.read(self.split, i) for i in (episode.query, *episode.supports)]
        for support in found[1:]:
            check_support(found[0], support)
        return found

    def read(self, episode: Episode) -> list[Sample]:
        """The same with binary masks."""
        ignore = self.dataset.classes.ignore_index
        return [sample._replace(mask=binary(sample.mask, episode.label, ignore)) for sample in self.samples(episode)]


@lru_cache(maxsize=4)
def _order(seed: int, round_: int, count: int) -> tuple[int, ...]:
    """The order of the queries in a shuffled round."""
    return tuple(np.random.default_rng([seed, round_, 0]).permutation(count).tolist())


def check_support(query: Sample, support: Sample) -> None:
    """Raises UserError if both are the same picture: its mask would be the answer."""
    if np.array_equal(query.image, support.image):
        raise UserError(f"support {support.name} equals the query {query.name}; use different images, remove the copy")


def binary(mask: NDArray[Any], label: int, ignore: int) -> NDArray[np.uint8]:
    """1 for the class, 255 where ignored, else 0."""
    return np.where(mask == ignore, 255, mask == label).astype(np.uint8)


def base_mask(mask: NDArray[Any], base: Sequence[int], ignore: int) -> NDArray[np.uint8]:
    """Base classes as 1, 2, ... in the order given, 255 where ignored, all else 0. Raises UserError above 254 classes.

    A novel class in a training image is background here, as where `keep_novel` is set.
    """
    if len(base) > 254:
        raise UserError(f"the fold has {len(base)} base classes; at most 254 can be told apart, split it up")
    table = np.zeros(ignore + 1, np.uint8)
    table[list(base)], table[ignore] = np.arange(1, len(base) + 1), 255
    found: NDArray[np.uint8] = table[mask]
    return found


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
