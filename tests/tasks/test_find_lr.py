"""The learning-rate finder: the curve's arithmetic, a real sweep, and that it leaves nothing behind."""

import json
import math

import numpy as np
import pytest

from segvit import cli
from segvit.contracts import UserError
from segvit.engine.fit import NotFiniteError
from segvit.tasks import find_lr as module
from segvit.tasks.find_lr import LOWEST, STEPS, find_lr, growth, smoothed, suggest
from tests.tasks.tiny import experiment, write_recipe

RATES = [LOWEST * growth() ** i for i in range(STEPS)]


def curve(*, falls=1e-4, rises=1e-1):
    """A loss that falls by half around one rate and explodes at another."""
    return [1 - 0.5 / (1 + (falls / rate) ** 2) + (rate / rises) ** 2 for rate in RATES]


def test_rates_run_from_lowest_to_one():
    assert RATES[0] == 1e-7
    assert RATES[-1] == pytest.approx(1.0)


def test_smoothing_has_no_bias_at_the_start():
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smoothed([1.0, 0.0])[1] == pytest.approx(0.09 / 0.19)


def test_the_rate_of_the_steepest_fall_is_suggested():
    # The average lags behind by up to ten steps, each 18 % higher.
    assert 1e-4 <= suggest(RATES, curve()) <= 6e-4
    assert 1e-5 <= suggest(RATES, curve(falls=1e-5)) <= 6e-5
    assert suggest(RATES, curve()) == float(f"{suggest(RATES, curve()):.1e}")  # two digits


def test_it_stays_a_tenth_below_divergence():
    falling = list(np.linspace(10, 1, 60))  # ever steeper over the logarithm: the last would be chosen
    assert suggest(RATES[:60], [value**2 for value in falling]) <= RATES[59] / 10


def test_curves_without_an_answer_are_refused():
    with pytest.raises(UserError, match="did not fall at any rate"):
        suggest(RATES, list(np.linspace(1, 9, STEPS)))
    with pytest.raises(UserError, match="not finite after 3 steps at tiny rates"):
        suggest(RATES[:3], [1.0, 1.0, 1.0])


def test_a_sweep_of_a_real_model(tmp_path):
    found = find_lr(experiment(tmp_path / "run", steps=1))
    assert 1e-6 < found.report["lr"] < 0.3
    rates, losses = found.report["rates"], found.report["losses"]
    assert len(rates) == len(losses) >= 50
    assert rates == pytest.approx(RATES[: len(rates)])
    assert all(math.isfinite(loss) for loss in losses)
    assert min(found.report["smoothed"]) < 0.9 * losses[0]
    assert found.text.splitlines()[-1] == f"optim.lr: {found.report['lr']:g}"
    assert not (tmp_path / "run").exists()
    again = find_lr(experiment(tmp_path / "run", steps=1))
    assert again == found


def test_the_sweep_ends_where_the_loss_explodes(tmp_path, monkeypatch):
    losses = iter([*np.linspace(3, 1, 40), *[50.0] * 60])
    monkeypatch.setattr(module, "fit", fake_fit(losses))
    found = find_lr(experiment(tmp_path, steps=1))
    assert len(found.report["losses"]) == 41
    assert found.report["lr"] <= found.report["rates"][-1] / 10


def test_a_loss_that_is_nan_ends_the_sweep_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fit", fake_fit(iter(np.linspace(3, 1, 40)), end=NotFiniteError("nan")))
    assert len(find_lr(experiment(tmp_path, steps=1)).report["losses"]) == 40


def fake_fit(losses, end=None):
    def fit(model, optimizer, batches, *, report, after, **others):
        for step, loss in enumerate(losses, start=1):
            report({"loss": float(loss)})
            after(step)
        if end is not None:
            raise end

    return fit


def test_at_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "fit", fake_fit(iter(curve())))
    recipe = write_recipe(tmp_path / "recipe.yaml")
    cli.main(["find_lr", "--config", str(recipe), "--optim.clip", "1", "--json"])
    lr = json.loads(capsys.readouterr().out)["lr"]
    monkeypatch.setattr(module, "fit", fake_fit(iter(curve())))
    cli.main(["find_lr", "--config", str(recipe)])
    shown = capsys.readouterr().out
    assert f"optim.lr: {lr:g}" in shown
    assert list(tmp_path.iterdir()) == [recipe]


def test_it_needs_data_but_neither_out_nor_steps(capsys, monkeypatch):
    monkeypatch.setattr(module, "find_lr", lambda run: module.FoundRate({"steps": run.steps}, "found"))
    cli.main(["find_lr", "--data", "synthetic:shapes"])
    assert capsys.readouterr().out == "found\n"
    with pytest.raises(SystemExit):
        cli.main(["find_lr", "--config", "nowhere.yaml"])
    assert "nowhere.yaml" in capsys.readouterr().err
