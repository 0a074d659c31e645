"""From datasets to batches, with randomness that does not depend on who does the work.

Training data is an endless sequence of draws. Draw d of a set of n images is image permutation(d // n)[d % n], varied
by a generator seeded with (seed, d). So any worker, process or resumed run that is asked for draw d makes the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from segvit.contracts import Batch, InputSpec, Sample, UserError
from segvit.data.dataset import Dataset
from segvit.data.prepare import normalise, pad
from segvit.data.transforms import Augment, augment

SHUFFLE = 1  # third word of the shuffling seed: without it epoch d would share its random numbers with draw d

COLORS = 2  # likewise, of the seed that chooses whose colours an image takes
CELL = 32  # pixels that sizes of passes are multiples of

Draw = int | tuple[int, float]  # the number of a draw, and the factor of the crop at which it is wanted
Item = tuple[Tensor, Tensor, str]  # image (3, H, W), mask (H, W), name


class LoadingError(UserError):
    """A `UserError` that keeps its one line on the way out of a worker.

    torch makes the exception anew from the text of the worker's traceback; only its last part is for the user.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@dataclass(frozen=True)
class Draws(TorchDataset[Item]):
    """The sequence of training draws, indexed by draw number."""

    dataset: Dataset
    spec: InputSpec
    recipe: Augment
    seed: int
    split: str = "train"
    rarity: NDArray[np.float32] | None = None  # (K,) how much rare crops seek each class

    def __getitem__(self, wanted: Draw) -> Item:
        draw, factor = wanted if isinstance(wanted, tuple) else (wanted, 1.0)
        epoch, place = divmod(draw, self.dataset.count(self.split))
        index = int(permutation(self.seed, epoch, self.dataset.count(self.split))[place])
        ignore = self.dataset.classes.ignore_index
        sample = _read(self.dataset, self.split, index)
        rng, other = np.random.default_rng([self.seed, draw]), self.whose_colors(draw)
        sample = augment(sample, self.recipe, rng, ignore, self.rarity, other)
        image, mask = pad(normalise(sample.image, self.spec), sample.mask, self.recipe.crop, ignore)
        if factor != 1:
            image, mask = at_factor(image, mask, factor)
        # torch has few operations for uint16, so ids above 255 become int32.
        kind = np.uint8 if ignore == 255 else np.int32
        return image, torch.from_numpy(mask.astype(kind, order="C")), sample.name

    def whose_colors(self, draw: int) -> NDArray[np.uint8] | None:
        """The training image whose colours a draw takes; None where it keeps its own."""
        rng = np.random.default_rng([self.seed, draw, COLORS])
        if not self.recipe.color_transfer or rng.random() >= self.recipe.color_transfer:
            return None
        return _read(self.dataset, self.split, int(rng.integers(self.dataset.count(self.split)))).image


@dataclass(frozen=True)
class Samples(TorchDataset[Sample]):
    """The samples of a split as they are."""

    dataset: Dataset
    split: str

    def __getitem__(self, index: int) -> Sample:
        return _read(self.dataset, self.split, index)


def at_factor(image: Tensor, mask: NDArray[Any], factor: float) -> tuple[Tensor, NDArray[Any]]:
    """A normalised image (C, H, W) and its mask (H, W) at that factor of their size, in multiples of 32 pixels.

    Corners fall on corners, as in the released code of DuAT; it also blends masks, where this takes the nearest pixel.
    """
    sides = [max(1, round(side * factor / CELL)) * CELL for side in mask.shape]
    resized = F.interpolate(image[None], size=sides, mode="bilinear", align_corners=True)[0]
    rows, columns = (
        np.rint(np.linspace(0, old - 1, new)).astype(np.intp) for old, new in zip(mask.shape, sides, strict=True)
    )
    return resized, mask[rows[:, None], columns]


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of the images in one epoch."""
    return np.random.default_rng([seed, epoch, SHUFFLE]).permutation(count)


def train_batches(
    dataset: Dataset, *, spec: InputSpec, augment: Augment, seed: int,
    draws: Iterable[list[int]] | Iterable[list[Draw]], workers: int, rarity: NDArray[np.float32] | None = None,
) -> DataLoader[Item]:  # fmt: skip
    """A loader of `Batch`: one for each list of draw numbers, every image padded to the crop.

    `rarity` (K,) is needed where `augment` has rare crops.
    """
    if not dataset.count("train"):
        raise UserError("the train split holds no images; add some")
    sequence = Draws(dataset, spec, augment, seed, rarity=rarity)
    return DataLoader(
        sequence, batch_sampler=draws, num_workers=workers, collate_fn=collate,
        worker_init_fn=_use_one_thread, pin_memory=torch.cuda.is_available(), generator=_own_generator(),
    )  # fmt: skip


def living(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches; raises UserError when a process that loads them was killed."""
    try:
        yield from batches
    except RuntimeError as error:  # torch has no class of its own for this
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a loader process was killed ({str(error).partition(chr(10))[0]}), mostly for lack of memory; go on with "
            "--resume and fewer --workers"
        ) from error


def samples(
    dataset: Dataset, split: str, *, indices: Sequence[int] | None = None, workers: int = 0
) -> Iterator[Sample]:
    """The samples of a split in order, or those of `indices` in theirs."""
    order = range(dataset.count(split)) if indices is None else indices
    loader: DataLoader[Sample] = DataLoader(
        Samples(dataset, split), batch_size=None, sampler=order, num_workers=workers, collate_fn=_unchanged,
        worker_init_fn=_use_one_thread, generator=_own_generator(),
    )  # fmt: skip
    try:
        yield from loader
    except LoadingError as error:
        # The traceback holds the loader in a cycle; without it the workers end now and not when memory is next swept.
        raise error.with_traceback(None) from None


def collate(items: list[Item]) -> Batch:
    """Items of one size as a batch."""
    images, masks, names = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.stack(masks), list(names))


def _read(dataset: Dataset, split: str, index: int) -> Sample:
    try:
        return dataset.read(split, index)
    except UserError as error:
        raise LoadingError(str(error)) from None


def _unchanged(sample: Any) -> Any:
    # In the place of torch's default, which would turn arrays into tensors; torch types it for lists only.
    return sample


def _use_one_thread(worker: int) -> None:
    # Workers that each use all cores slow each other down.
    torch.set_num_threads(1)


def _own_generator() -> torch.Generator:
    # Without one of its own a loader takes a number from torch's global generator, and with it dropout's next mask.
    return torch.Generator().manual_seed(0)
