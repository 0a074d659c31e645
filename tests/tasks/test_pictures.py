"""Sheets of validation images, and a run that draws them without changing its training."""

import numpy as np
import pytest
from PIL import Image

from segvit.data.dataset import open_dataset
from segvit.inference.predictor import Predictor
from segvit.tasks.dense import train
from segvit.tasks.pictures import CELL, side_by_side
from tests.inference.fake import FakeRuntime
from tests.tasks.tiny import DATA, experiment, steps


@pytest.fixture(scope="module")
def dataset():
    return open_dataset(DATA)


def test_a_row_an_image_and_a_legend(dataset):
    predictor = Predictor(FakeRuntime(len(dataset.classes)))
    one, two = (side_by_side(predictor, dataset, "val", range(count)) for count in (1, 2))
    assert one.dtype == np.uint8
    assert one.shape[1] == two.shape[1] > 3 * CELL
    assert CELL <= two.shape[0] - one.shape[0] < CELL + 60  # the legend may need one line more
    colors = {tuple(color) for color in one.reshape(-1, 3)}
    assert {dataset.classes.palette[i] for i in np.unique(dataset.read("val", 0).mask) if i != 255} <= colors


def test_a_run_draws_its_validations_and_trains_as_without(tmp_path):
    pytest.importorskip("tensorboard")
    plain, drawn = tmp_path / "plain", tmp_path / "drawn"
    train(experiment(plain, val_every=3))
    train(experiment(drawn, val_every=3, val_pictures=2, log=["tensorboard"]))
    assert [path.name for path in sorted((drawn / "pictures").iterdir())] == ["step_000003.png", "step_000006.png"]
    with Image.open(drawn / "pictures" / "step_000006.png") as sheet:
        assert sheet.height > 2 * CELL
    assert steps(drawn) == steps(plain)
    assert not (plain / "pictures").exists()
    assert len(list((drawn / "tb").iterdir())) == 1
    table = (drawn / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["step", *"123456"]
    assert table[0].split(",")[-3:] == ["val_miou", "val_macc", "val_aacc"]
