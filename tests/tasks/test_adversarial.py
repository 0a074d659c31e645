"""Adversarial training: both players resume exactly, NaN stops, mistakes are named, the command runs; it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segvit import cli
from segvit.contracts import UserError
from segvit.data.transforms import Augment
from segvit.engine.fit import NotFiniteError
from segvit.engine.run import STATE
from segvit.engine.settings import Optim, Schedule
from segvit.engine.state import read_state
from segvit.tasks import adversarial
from segvit.tasks.adversarial import Adversarial, train_adversarial
from segvit.tasks.experiment import Experiment
from tests.tasks.tiny import steps

TINY: dict[str, Any] = {"width": 32, "units": [1, 1, 1], "dim": 32, "heads": 2, "depth": 1}
MODEL = TINY | {"grid": [4] * 4, "iterations": 2, "decoder_dim": 32}


def run(
    out: Path, *, see: Any = "foreground", critic_steps: int = 1, weight: float = 0.1, **changes: Any
) -> Adversarial:
    base = Experiment(
        data="synthetic:shapes?train=8&val=2&size=32", out=str(out), model="castformer_r50", options=MODEL, steps=4,
        batch_size=2, augment=Augment(crop=(32, 32)), optim=Optim(lr=1e-3, lr_mult={}), schedule=Schedule(warmup=1),
        workers=0, device="cpu", val_every=3, checkpoint_every=2,
    )  # fmt: skip
    return Adversarial(
        generator=replace(base, **changes), critic=TINY, see=see, critic_steps=critic_steps, weight=weight
    )


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_resumed_run_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"critic_steps": 2}
    whole = train_adversarial(run(tmp_path / "whole", **options))
    step = adversarial.Game.step

    def cut(game: Any, batches: Any, number: int) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return step(game, batches, number)

    monkeypatch.setattr(adversarial.Game, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        train_adversarial(run(tmp_path / "cut", checkpoint_every=2, val_every=0, **options))
    monkeypatch.setattr(adversarial.Game, "step", step)
    again = train_adversarial(run(tmp_path / "cut", resume=True, **options))
    assert whole is not None
    assert again is not None
    assert again.miou == whole.miou
    states = [read_state(tmp_path / name / STATE) for name in ("whole", "cut")]
    assert same(states[0], states[1])
    assert set(states[0]) >= {"generator", "critic", "random", "step"}
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    row = steps(tmp_path / "whole")[0]
    assert row["loss"] == pytest.approx(row["loss_ce"] + row["loss_dice"] + row["loss_adversarial"])
    assert {"critic_gap", "critic_penalty", "critic_grad_norm"} <= row.keys()


def test_both_players_move_and_the_verdict_reaches_the_generator(tmp_path: Path) -> None:
    for weight in (0.1, 10.0):
        train_adversarial(run(tmp_path / str(weight), weight=weight, steps=2, val_every=0))
    weak, strong = (read_state(tmp_path / str(weight) / STATE) for weight in (0.1, 10.0))
    assert not same(weak["generator"]["model"], strong["generator"]["model"])
    first = steps(tmp_path / "0.1")[0], steps(tmp_path / "10.0")[0]
    assert first[0]["critic_gap"] == first[1]["critic_gap"]
    assert first[1]["loss_adversarial"] == pytest.approx(100 * first[0]["loss_adversarial"], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial, "gradient_penalty", lambda critic, real, fake: real.sum() * torch.nan)
    with pytest.raises(NotFiniteError, match=r"at step 1 \(penalty\); the batch was train_"):
        train_adversarial(run(tmp_path / "run"))
    assert not (tmp_path / "run" / STATE).exists()


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="knows no ema"):
        run(tmp_path, ema=0.9)
    with pytest.raises(UserError, match="needs fp32"):
        run(tmp_path, precision="bf16")
    with pytest.raises(UserError, match="segvit train trains without a critic"):
        run(tmp_path, weight=0.0)
    with pytest.raises(UserError, match="the critic has no option 'layers'"):
        Adversarial(generator=run(tmp_path).generator, critic={"layers": 3})


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"model": "castformer_r50", "options": MODEL, "epochs": 3, "augment": {"crop": [32, 32]}})
    )
    arguments = ["--config", str(recipe), "--data", "synthetic:shapes?train=4&val=2&size=32", "--workers", "0"]
    arguments += ["--out", str(tmp_path / "run"), "--steps", "1", "--batch_size", "2", "--device", "cpu", "--json"]
    cli.main(["adversarial", "train", *arguments, "--critic", json.dumps(TINY), "--see", "per_class"])
    assert set(json.loads(capsys.readouterr().out)) == {"miou", "macc", "aacc"}
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["adversarial"]["critic"] == TINY
    cli.main(["val", str(tmp_path / "run"), "--device", "cpu", "--workers", "0", "--json"])
    assert "miou" in json.loads(capsys.readouterr().out)


def layered_slices(folder: Path, *, train: int = 48, val: int = 12, size: int = 64) -> str:
    """Slices of a body with two organs: ellipses inside an ellipse, near each other in grey, under noise."""
    rows, columns = np.mgrid[:size, :size] / size
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((size, size), np.uint8)
            for label, (y, x, height, width) in enumerate(
                [(0.5, 0.5, 0.42, 0.38), (0.4, 0.36, 0.16, 0.12), (0.6, 0.64, 0.1, 0.16)], start=1
            ):
                y, x = (y, x) + rng.uniform(-0.05, 0.05, 2)
                mask[((rows - y) / height) ** 2 + ((columns - x) / width) ** 2 < 1] = label
            grey = np.array([30, 110, 150, 190])[mask] + rng.normal(0, 18, mask.shape)
            image = np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, 2)
            Image.fromarray(image).save(folder / "images" / split / f"{i}.png")
            Image.fromarray(mask).save(folder / "masks" / split / f"{i}.png")
    (folder / "classes.txt").write_text("outside\nbody\nliver\nspleen\n")
    return str(folder)


@pytest.mark.slow
def test_it_learns_layered_slices(tmp_path: Path) -> None:
    found = train_adversarial(
        run(
            tmp_path / "run", data=layered_slices(tmp_path / "data"), steps=40, batch_size=6, skip_check=True,
            augment=Augment(crop=(64, 64)), options=MODEL | {"grid": [8] * 4}, val_every=0, checkpoint_every=40,
            schedule=Schedule(warmup=5),
        )
    )  # fmt: skip
    assert found is not None
    print("mIoU", found.miou)
    assert found.miou > 0.5
