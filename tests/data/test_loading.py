"""Loaders: the same draws whoever makes them, and errors that reach the user in one line."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from segvit.contracts import Classes, InputSpec, Sample, UserError
from segvit.data.dataset import open_dataset
from segvit.data.loading import permutation, samples, train_batches
from segvit.data.transforms import Augment
from segvit.palette import generate_palette
from tests.data.folders import two_folders

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core

SHAPES = open_dataset("synthetic:shapes?train=10&val=3&size=32")
OPTIONS = {"spec": InputSpec(), "augment": Augment(crop=(24, 28)), "seed": 5}


def batches(draws, *, workers=0, dataset=SHAPES, **changed):
    return list(train_batches(dataset, draws=draws, workers=workers, **{**OPTIONS, **changed}))


def same(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.masks, other.masks) and one.names == other.names


def test_batches_have_the_contract():
    (batch,) = batches([[0, 1, 2]])
    assert batch.images.shape == (3, 3, 24, 28)
    assert batch.images.dtype == torch.float32
    assert batch.masks.shape == (3, 24, 28)
    assert batch.masks.dtype == torch.uint8
    assert len(batch.names) == 3


def test_a_draw_does_not_depend_on_who_makes_it():
    draws = [[0, 1], [12, 13], [3, 25]]
    here, there = batches(draws), batches(draws, workers=2)
    assert all(same(one, other) for one, other in zip(here, there, strict=True))
    (alone,) = batches([[13]])
    assert torch.equal(alone.images[0], here[1].images[1])
    (other,) = batches([[13]], seed=6)
    assert not torch.equal(other.images, alone.images)


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own():
    names = [batch.names for batch in batches([list(range(10)), list(range(10, 20))])]
    assert sorted(names[0]) == sorted(names[1]) == [f"train_{i:05d}" for i in range(10)]
    assert names[0] != names[1]
    assert [f"train_{i:05d}" for i in permutation(5, 1, 10)] == names[1]


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    batches([[0]])
    list(samples(SHAPES, "val"))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_come_in_order(workers):
    found = list(samples(SHAPES, "val", workers=workers))
    assert [sample.name for sample in found] == ["val_00000", "val_00001", "val_00002"]
    assert all(isinstance(sample, Sample) and isinstance(sample.image, np.ndarray) for sample in found)
    assert np.array_equal(found[1].image, SHAPES.read("val", 1).image)
    assert [sample.name for sample in samples(SHAPES, "val", indices=[2, 0], workers=workers)] == [
        "val_00002", "val_00000",
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive_as_one_line(tmp_path, workers):
    root = two_folders(tmp_path, counts={"train": 1, "val": 1})
    for split in ("train", "val"):
        (root / f"images/{split}/0.png").write_text("broken")
    dataset = open_dataset(root)
    for broken in (lambda: list(samples(dataset, "val", workers=workers)),
                   lambda: batches([[0]], dataset=dataset, workers=workers)):  # fmt: skip
        with pytest.raises(UserError) as caught:
            broken()
        assert str(caught.value).startswith(str(root))
        assert str(caught.value).endswith("replace the file or take it out of the set")
        assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Threads:
    """A dataset of 300 classes whose mask shows how many threads torch uses where it is read."""

    classes = Classes(tuple(map(str, range(300))), generate_palette(300))
    splits = ("train",)

    def count(self, split):
        return 2

    def name(self, split, i):
        return str(i)

    def read(self, split, i):
        return Sample(np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 256 + torch.get_num_threads(), np.uint16))


def test_workers_use_one_thread_and_large_ids_survive():
    (batch,) = batches([[0]], dataset=Threads(), workers=1, augment=Augment(crop=(40, 40)))
    assert batch.masks.dtype == torch.int32
    assert set(batch.masks.unique().tolist()) == {257, 65535}


def test_an_empty_training_set_is_refused():
    class Empty(Threads):
        def count(self, split):
            return 0

    with pytest.raises(UserError, match="holds no images"):
        batches([[0]], dataset=Empty())


def test_a_batch_at_several_sizes_shows_the_same_crops():
    (whole,) = batches([[4, 5]], augment=Augment(crop=(64, 96)))
    small, large = batches([[(4, 0.75), (5, 0.75)], [(4, 1.25), (5, 1.25)]], augment=Augment(crop=(64, 96)))
    assert small.images.shape[2:] == small.masks.shape[1:] == (64, 64)
    assert large.images.shape[2:] == large.masks.shape[1:] == (64, 128)
    for batch in (small, large):
        assert batch.names == whole.names
        torch.testing.assert_close(batch.images[..., 0, 0], whole.images[..., 0, 0])  # corners fall on corners
        torch.testing.assert_close(batch.images[..., -1, -1], whole.images[..., -1, -1])
        assert torch.equal(batch.masks[:, -1, -1], whole.masks[:, -1, -1])
        assert set(batch.masks.unique().tolist()) <= set(whole.masks.unique().tolist())


def test_colours_come_from_other_images_and_leave_the_crops_alone():
    recipe = {"crop": (32, 32), "photometric": False}
    (plain,) = batches([[0, 1, 2, 3]], augment=Augment(**recipe))
    (always,) = batches([[0, 1, 2, 3]], augment=Augment(**recipe, color_transfer=1.0))
    (some,) = batches([list(range(10))], augment=Augment(**recipe, color_transfer=0.5))
    (none,) = batches([list(range(10))], augment=Augment(**recipe))
    assert torch.equal(plain.masks, always.masks)
    assert not torch.equal(plain.images, always.images)
    kept = [torch.equal(one, other) for one, other in zip(some.images, none.images, strict=True)]
    assert 1 <= sum(kept) <= 9
