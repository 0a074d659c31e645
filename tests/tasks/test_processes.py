"""Several real processes (gloo): the same samples, losses and integers as one, whole files from sharded weights."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

from segvit.cli import main
from segvit.model_folder import load_model
from tests.tasks.tiny import OPTIONS, environment, history, steps, write_recipe

STILL = OPTIONS | {"dropout": 0.0, "drop_path": 0.0}
LONG = {"steps": 20, "batch_size": 4, "val_every": 10, "checkpoint_every": 10, "options": STILL}


def launched(folder, *more, code=0, recipe=None):
    """The run in two processes under torchrun; returns what it said."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0", "-m", "segvit", "train", "--config", str(recipe), "--out", str(folder),
        *map(str, more),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run in this process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    recipe = write_recipe(folder.parent / "recipe.yaml", **LONG)
    main(["train", "--config", str(recipe), "--out", str(folder)])
    return folder


def assert_agree(folder, one):
    """Losses to 1e-5, gradient norms, and the integers of the confusion matrix but for labels on an edge."""
    ours, theirs = steps(folder), steps(one)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, 21))
    for row, expected in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    counts, expected = (np.array(json.loads((run / "val.json").read_text())["confusion"]) for run in (folder, one))
    assert counts.sum() == expected.sum()
    assert np.abs(counts - expected).sum() <= 4  # pixels: weights differ in the last bits
    first, second = ([row["val"] for row in history(run) if "val" in row] for run in (folder, one))
    assert len(first) == len(second) == 2
    for row, expected in zip(first, second, strict=True):
        assert row == pytest.approx(expected, abs=2e-3)


def test_two_processes_are_one_also_with_accumulation(tmp_path, one):
    recipe = write_recipe(tmp_path / "recipe.yaml", **LONG)
    launched(tmp_path / "run", "--accumulate", 2, recipe=recipe)
    assert_agree(tmp_path / "run", one)


def test_the_same_weights_give_the_same_confusion_matrix(tmp_path, one):
    """A learning rate of 0 keeps the weights of `one`, so that only the counting differs: not one pixel may."""
    options = {"steps": 2, "init": str(one / "model"), "optim": {"lr": 0.0}, "val_every": 1, "options": STILL}
    recipe = write_recipe(tmp_path / "recipe.yaml", **options)
    launched(tmp_path / "two", recipe=recipe)
    main(["train", "--config", str(recipe), "--out", str(tmp_path / "alone")])
    two, alone, before = (
        json.loads((run / "val.json").read_text()) for run in (tmp_path / "two", tmp_path / "alone", one)
    )
    assert two["confusion"] == alone["confusion"] == before["confusion"]
    assert np.count_nonzero(np.sum(two["confusion"], axis=0)) > 1  # several classes are predicted


def test_sharded_weights_give_whole_files_and_resume(tmp_path, one):
    recipe = write_recipe(tmp_path / "recipe.yaml", **LONG)
    folder = tmp_path / "run"
    launched(folder, "--shard", "--steps", 10, recipe=recipe)
    # The schedule of a longer run differs from the first step on, so only the first losses are those of `one`.
    assert steps(folder)[0]["loss"] == pytest.approx(steps(one)[0]["loss"], rel=1e-5)
    said = launched(folder, "--shard", "--resume", "--steps", 20, recipe=recipe)
    assert "resumed at step 10" in said
    assert [row["step"] for row in steps(folder)] == list(range(1, 21))
    weights = load_file(folder / "model" / "model.safetensors")
    assert {key: tuple(value.shape) for key, value in weights.items()} == {
        key: tuple(value.shape) for key, value in load_model(one).state_dict().items()
    }
    load_model(folder)  # in one process


@pytest.mark.slow
def test_two_nodes_are_one_too(tmp_path, one):
    """The command line of several nodes, both on this machine."""
    recipe = write_recipe(tmp_path / "recipe.yaml", **LONG)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=night", "-m", "segvit", "train", "--config", str(recipe),
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    nodes = [subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for node in nodes:
        _, said = node.communicate(timeout=300)
        assert node.returncode == 0, said[-3000:]
    assert_agree(tmp_path / "run", one)


def test_sharding_needs_company(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", **LONG)
    with pytest.raises(SystemExit):
        main(["train", "--config", str(recipe), "--out", str(tmp_path / "run"), "--shard"])
    assert "shard needs several processes; start with torchrun" in capsys.readouterr().err
