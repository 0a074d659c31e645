"""Tuning methods in a training run, its folders, and the adapters commands."""

from __future__ import annotations

import json

import pytest
import torch

from segvit.adapters.files import TENSORS
from segvit.cli import main
from segvit.contracts import UserError
from segvit.model_folder import load_model
from segvit.tasks.dense import build_model, train
from segvit.tasks.experiment import Experiment
from segvit.tasks.run import Run
from segvit.zoo import numbered_classes
from tests.tasks.tiny import experiment, steps, write_recipe


def test_the_optimiser_sees_only_what_trains(tmp_path, capsys):
    base = train(experiment(tmp_path / "base", steps=2))
    before = load_model(base.folder)
    run = train(experiment(tmp_path / "run", init=str(base.folder), adapter="ssf"))
    after = load_model(run.folder)
    after.adapter.disable()
    for name, value in before.backbone.state_dict().items():
        torch.testing.assert_close(after.backbone.state_dict()[name], value, rtol=0, atol=0)
    assert not torch.equal(before.head.state_dict()[first(before.head)], after.head.state_dict()[first(after.head)])
    after.adapter.enable()
    scales = [after.backbone.get_parameter(name) for name in after.adapter.names]
    assert all(scale.isfinite().all() for scale in scales)
    state = torch.load(run.folder / "checkpoints" / "last" / "state.pt", weights_only=True)
    trained = [parameter for parameter in after.parameters() if parameter.requires_grad]
    assert len(state["optimizer"]["state"]) <= len(trained) < len(list(after.parameters()))
    log = (run.folder / "train.log").read_text()
    total = sum(parameter.numel() for parameter in after.parameters())
    numbers = sum(parameter.numel() for parameter in trained)
    assert f"{numbers / 1e6:.2f} of {total / 1e6:.2f} M parameters train" in log


def first(module):
    return next(name for name, _ in module.named_parameters())


def test_the_adapter_folder_stands_on_its_base(tmp_path):
    base = train(experiment(tmp_path / "base", steps=1))
    run = train(experiment(tmp_path / "run", init=str(base.folder), adapter="lora", adapter_options={"rank": 2}))
    images = torch.randn(1, 3, 32, 32)
    expected = load_model(run.folder)(images).logits
    loaded = load_model(run.folder / "adapter")
    torch.testing.assert_close(loaded(images).logits, expected, rtol=1e-4, atol=1e-5)
    small, whole = (run.folder / "adapter" / TENSORS).stat().st_size, run.folder / "model" / "model.safetensors"
    assert small < 0.8 * whole.stat().st_size


def test_without_base_weights_the_run_is_the_base(tmp_path):
    run = train(experiment(tmp_path / "run", adapter="bitfit", steps=2))
    loaded = load_model(run.folder / "adapter")
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(images).logits, load_model(run.folder)(images).logits, rtol=1e-4, atol=1e-5)
    (run.folder / "model").rename(run.folder / "other")
    with pytest.raises(UserError, match="which is gone"):
        load_model(run.folder / "adapter")
    load_model(run.folder / "adapter", base=run.folder / "other")


def test_full_tuning_writes_no_adapter_folder(tmp_path):
    run = train(experiment(tmp_path / "run", adapter="full", steps=1))
    assert not (run.folder / "adapter").exists()
    assert load_model(run.folder).config.adapter == {"method": "full", "options": {}}


def test_an_average_is_saved_with_its_adapter(tmp_path):
    run = train(experiment(tmp_path / "run", adapter="vpt_deep", ema=0.5, adapter_options={"num_prompts": 2}))
    images = torch.randn(1, 3, 32, 32)
    expected = load_model(run.folder)(images).logits
    torch.testing.assert_close(load_model(run.folder / "adapter")(images).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["vpt_deep", "lora"])
def test_a_resumed_run_is_the_whole_run(tmp_path, monkeypatch, adapter):
    base = train(experiment(tmp_path / "base", steps=1))
    options = {"adapter": adapter, "init": str(base.folder), "checkpoint_every": 3}
    whole = train(experiment(tmp_path / "whole", **options))
    save = Run.save

    def stop(self, *, best):
        save(self, best=best)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(experiment(tmp_path / "parts", **options))
    monkeypatch.setattr(Run, "save", save)
    parts = train(experiment(tmp_path / "parts", resume=True, **options))
    assert steps(parts.folder) == steps(whole.folder)
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (parts.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    load_model(parts.folder / "adapter")


def test_mistakes_are_found_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="did you mean"):
        train(experiment(tmp_path / "run", adapter="vpt"))
    with pytest.raises(UserError, match="has no option"):
        train(experiment(tmp_path / "run", adapter="ssf", adapter_options={"rank": 3}))
    with pytest.raises(UserError, match="belong to no adapter"):
        experiment(tmp_path / "run", adapter_options={"rank": 3})
    assert not (tmp_path / "run").exists()


def test_the_commands(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", steps=2)
    run = tmp_path / "run"
    main(["train", "--config", str(recipe), "--out", str(run), "--adapter", "ssf"])
    capsys.readouterr()
    main(["adapters", "inspect", str(run), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "ssf"
    assert report["base"] == "../model"
    main(["adapters", "merge", str(run), "--out", str(tmp_path / "plain")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "plain")
    assert load_model(tmp_path / "plain").adapter is None
    main(["adapters", "merge", str(run / "adapter"), "--out", str(tmp_path / "plain2")])
    images = torch.randn(1, 3, 32, 32)
    expected = load_model(run)(images).logits
    for plain in ("plain", "plain2"):
        torch.testing.assert_close(load_model(tmp_path / plain)(images).logits, expected, rtol=1e-3, atol=1e-4)
    capsys.readouterr()
    main(["adapters", "list"])
    out = capsys.readouterr().out
    assert "vpt_deep" in out
    assert "--adapter_options.num_prompts 10" in out
    with pytest.raises(SystemExit):
        main(["adapters", "inspect", str(tmp_path / "plain")])
    assert "holds no adapter" in capsys.readouterr().err


def test_options_on_the_command_line(tmp_path, monkeypatch):
    seen: list[Experiment] = []
    monkeypatch.setattr("segvit.tasks.dense.train", seen.append)
    recipe = write_recipe(tmp_path / "recipe.yaml")
    options = ["--adapter", "vpt_deep", "--adapter_options.num_prompts", "3"]
    main(["train", "--config", str(recipe), "--out", "x", *options])
    assert seen[0].adapter_options == {"num_prompts": 3}
    assert build_model(seen[0], numbered_classes(3)).backbone.gaps["0"].prompt_embeddings.shape == (1, 3, 64)
