"""The overfit check: what it trains on, what it validates on, and what it says."""

import numpy as np
import pytest
import yaml

from segvit.contracts import Sample, UserError
from segvit.data.dataset import open_dataset
from segvit.data.loading import train_batches
from segvit.data.transforms import Augment
from segvit.engine.settings import Optim, Schedule
from segvit.model_folder import load_model
from segvit.tasks.dense import build_model, train
from segvit.tasks.experiment import Experiment, Input
from segvit.tasks.overfit import fixed_crop, learn_by_heart, verdict
from tests.tasks.tiny import experiment, history


def test_four_images_are_learnt_by_heart(tmp_path):
    options = {"image_size": 64, "patch_size": 4, "depth": 2, "embed_dim": 64, "out_indices": [0, 1], "layers": 1,
               "drop_path": 0.0, "dropout": 0.0}  # fmt: skip
    run = Experiment(
        data="synthetic:shapes?train=12&val=4&size=64", out=str(tmp_path / "run"), model="segvit_vit_tiny",
        options=options, steps=170, batch_size=4, augment=Augment(crop=(64, 64)),
        optim=Optim(lr=3e-3, lr_mult={}, clip=5.0), schedule=Schedule(kind="cosine", warmup=1500),
        loss={"dice_weight": 5.0, "alpha": 0.5}, workers=0, device="cpu", precision="fp32", overfit=4, val_every=0,
    )  # fmt: skip
    result = train(run)
    assert result.metrics.miou >= 0.95
    log = (tmp_path / "run" / "train.log").read_text()
    assert "4 training and 4 validation images" in log
    assert (
        f"overfit check passed: mIoU {result.metrics.miou:.4f} on the 4 images that it trained on (0.95 asked)" in log
    )
    assert (
        yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["schedule"]["warmup"] == 1500
    )  # as it was given


def test_a_run_too_short_says_so_and_can_go_on(tmp_path):
    train(experiment(tmp_path / "run", overfit=2, steps=2, batch_size=4))
    assert "overfit check failed: mIoU 0." in (tmp_path / "run" / "train.log").read_text()
    train(experiment(tmp_path / "run", overfit=2, steps=3, batch_size=4, resume=True))
    assert [row["step"] for row in history(tmp_path / "run") if "loss" in row] == [1, 2, 3]


def test_every_draw_is_the_same_and_what_validation_sees(tmp_path):
    run = experiment(
        tmp_path, overfit=2, augment=Augment(crop=(24, 24)), input=Input(scale=(20, 20), window=(8, 8), stride=(4, 4)),
        cache="ram", schedule=Schedule(warmup=1500), steps=40,
    )  # fmt: skip
    plan, few = learn_by_heart(run, open_dataset(run.data))
    spec = build_model(plan, few.classes).spec
    loader = train_batches(few, spec=spec, augment=plan.augment, seed=0, draws=[[0, 1], [2, 3], [4, 5]], workers=0)
    first, *others = [dict(zip(batch.names, batch.images.unbind(), strict=True)) for batch in loader]
    assert set(first) == {few.name("train", 0), few.name("val", 1)}
    assert all((other[name] == first[name]).all() for other in others for name in first)
    assert few.read("val", 0).image.shape == (24, 24, 3)
    assert (spec.scale, spec.window, plan.cache, plan.schedule.warmup) == (None, None, "none", 4)
    assert few.splits == ("train", "val")


def test_crops_are_the_middle_at_the_recipes_scale():
    image = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    mask = np.zeros((40, 60), np.uint8)
    mask[20:, 30:] = 1
    same = fixed_crop(Sample(image, mask, "a"), Augment(crop=(20, 30)))
    assert (same.image == image[10:30, 15:45]).all()
    assert (same.mask == mask[10:30, 15:45]).all()
    half = fixed_crop(Sample(image, mask, "a"), Augment(crop=(64, 20), scale=(20, 30)))
    assert (half.image.shape, half.mask.shape) == ((20, 20, 3), (20, 20))
    assert half.mask.tolist() == [[0] * 20] * 10 + [[0] * 10 + [1] * 10] * 10


def test_without_the_check_nothing_changes(tmp_path):
    run = experiment(tmp_path)
    dataset = open_dataset(run.data)
    assert learn_by_heart(run, dataset) == (run, dataset)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="overfit is 13 but there are 12 training images; lower it"):
        train(experiment(tmp_path / "run", overfit=13))
    with pytest.raises(UserError, match="overfit must be positive, got 0"):
        experiment(tmp_path, overfit=0)
    assert not (tmp_path / "run").exists()


def test_the_saved_model_is_a_model(tmp_path):
    train(experiment(tmp_path / "run", overfit=1, steps=1))
    assert load_model(tmp_path / "run").spec.scale is None


class Figure:
    """Metrics with a mIoU."""

    def __init__(self, miou):
        self.miou = miou


def test_the_goal_is_part_of_success():
    assert verdict(Figure(0.95), 4).startswith("overfit check passed: mIoU 0.9500 on the 4 images")
    assert "failed: mIoU 0.9499" in verdict(Figure(0.9499), 4)
    assert "failed: mIoU nan" in verdict(Figure(float("nan")), 4)
