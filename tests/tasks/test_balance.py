"""What a recipe's class_balance and rare crops do to a run."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from segvit import zoo
from segvit.contracts import UserError
from segvit.data.balance import class_weights, count_pixels
from segvit.data.dataset import open_dataset
from segvit.data.transforms import Augment
from segvit.engine.settings import Schedule
from segvit.tasks import dense
from segvit.tasks.balance import class_balance
from segvit.tasks.dense import train
from tests.tasks.tiny import DATA, experiment, steps

SEGMENTER = {
    "model": "segmenter_vit_tiny", "options": {"image_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 64},
    "steps": 2, "val_every": 0, "val_images": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
    """Only the training matters here."""
    monkeypatch.setattr(dense, "finish", lambda *given, **named: None)


def test_nothing_is_read_unless_asked_for(tmp_path):
    class Unread:
        pass

    assert class_balance(experiment(tmp_path), Unread()) == (None, None)


def test_weights_and_rarity_come_from_the_train_split(tmp_path):
    dataset = open_dataset(DATA)
    pixels = count_pixels(dataset, "train")
    run = experiment(tmp_path, class_balance="log", augment=Augment(rare_crops=0.5))
    weights, rarity = class_balance(run, dataset)
    assert np.array_equal(weights, class_weights(pixels, "log"))
    assert np.array_equal(rarity, class_weights(pixels, "sqrt"))
    assert class_balance(replace(run, class_balance="none"), dataset).weights is None
    assert class_balance(replace(run, augment=Augment()), dataset).rarity is None


def test_class_balance_changes_the_loss(tmp_path):
    train(experiment(tmp_path / "plain", **SEGMENTER))
    balanced = experiment(tmp_path / "balanced", **SEGMENTER, class_balance="sqrt")
    train(balanced)
    first, weighed = steps(tmp_path / "plain")[0], steps(tmp_path / "balanced")[0]
    assert first["loss_ce"] != weighed["loss_ce"]
    log = (tmp_path / "balanced" / "train.log").read_text()
    assert re.search(r"class weights from 0\.\d+ \(\w+\) to [\d.]+ \(\w+\)", log)
    with pytest.raises(UserError, match="class_balance: sqrt -> log"):
        train(replace(balanced, class_balance="log", resume=True))


def test_a_resumed_run_goes_on_with_rare_crops_and_weights(tmp_path):
    options = SEGMENTER | {"class_balance": "log", "augment": Augment(crop=(24, 24), rare_crops=0.5)}
    constant = {"schedule": Schedule(kind="constant", warmup=0)}  # then the length of a run changes no step
    train(experiment(tmp_path / "parts", **options | constant))
    train(experiment(tmp_path / "parts", **options | constant | {"steps": 4}, resume=True))
    train(experiment(tmp_path / "whole", **options | constant | {"steps": 4}))
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole")


def test_other_losses_by_name(tmp_path):
    train(experiment(tmp_path / "a", **SEGMENTER, loss={"cross_entropy": 0, "dice": 1, "lovasz": 0.5}))
    assert {name for name in steps(tmp_path / "a")[0] if name.startswith("loss_")} == {"loss_dice", "loss_lovasz"}


def test_a_system_without_class_weights_says_so(tmp_path, monkeypatch):
    def criterion(out, masks, totals, *, ignore_index=255):
        return {"loss": torch.zeros(())}

    monkeypatch.setitem(zoo.MODELS, "plain", zoo.find_system("segmenter_vit_tiny")._replace(criterion=criterion))
    with pytest.raises(UserError, match="the loss of plain takes no class weights; set class_balance: none"):
        train(experiment(tmp_path / "a", **SEGMENTER | {"model": "plain"}, class_balance="log"))


def test_class_weights_are_no_loss_option(tmp_path):
    with pytest.raises(UserError, match="has no loss option 'class_weights'; it has cross_entropy, focal, dice"):
        train(experiment(tmp_path / "a", **SEGMENTER, loss={"class_weights": 2.0}))
