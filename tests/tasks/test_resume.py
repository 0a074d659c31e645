"""Killed and resumed through real processes: the result is bit for bit that of a run without interruption."""

import json
import multiprocessing
import random
import shutil
import subprocess
import time

import pytest

from segvit.cli import main
from segvit.tasks.dense import train as train_here
from tests.tasks.tiny import command, environment, experiment, history, steps, write_recipe

WEIGHTS = "model/model.safetensors"
RANDOM = {"steps": 12, "checkpoint_every": 1, "val_every": 4, "ema": 0.9}
OPTIONS = ("--steps", 12, "--checkpoint_every", 4, "--val_every", 0)


def train(folder, *more):
    """Run to the end; returns what it said."""
    recipe = write_recipe(folder.parent / "recipe.yaml")
    arguments = command("train", "--config", recipe, "--out", folder, *OPTIONS, *more)
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def written_steps(folder):
    """The last whole line's step."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def kill_after(folder, step, *more):
    """Start the run and kill it, with no chance to clean up, once `step` stands in its metrics."""
    recipe = write_recipe(folder.parent / "recipe.yaml")
    arguments = command("train", "--config", recipe, "--out", folder, *OPTIONS, *more)
    process = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        until = time.monotonic() + 240
        while written_steps(folder) < step:
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < until, "the run is too slow"
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run without interruption; in this process, which must not matter either."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    recipe = write_recipe(folder.parent / "recipe.yaml")
    main(list(map(str, ["train", "--config", recipe, "--out", folder, *OPTIONS])))
    return folder


def check(folder, whole):
    assert steps(folder) == steps(whole)
    assert [row["step"] for row in history(folder) if "val" not in row] == list(range(1, 13))
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (folder / "val.json").read_bytes() == (whole / "val.json").read_bytes()


def test_a_killed_run_resumes_bit_for_bit(tmp_path, whole):
    folder = tmp_path / "run"
    kill_after(folder, 6)
    assert 6 <= written_steps(folder) < 12
    assert not (folder / "val.json").exists()
    # Killed in the middle of a line and of a checkpoint.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    leftover = folder / "checkpoints" / "last" / ".123-abcdef.tmp"
    leftover.write_bytes(b"half a checkpoint")
    said = train(folder, "--resume")
    assert "resumed at step 4" in said or "resumed at step 8" in said
    check(folder, whole)


@pytest.mark.slow
def test_a_killed_run_with_workers_resumes_bit_for_bit(tmp_path, whole):
    folder = tmp_path / "run"
    kill_after(folder, 6, "--workers", 2)
    train(folder, "--resume", "--workers", 2)
    check(folder, whole)


def forked(folder):
    """Run or resume in a child that has everything imported already."""
    child = multiprocessing.get_context("fork").Process(
        target=train_here, args=(experiment(folder, **RANDOM, resume=True),)
    )
    child.start()
    return child


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that the killed ones must equal, and how long it takes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    started = time.monotonic()
    child = forked(folder)
    child.join(240)
    assert child.exitcode == 0
    return folder, time.monotonic() - started


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(i, marks=pytest.mark.slow) for i in range(3, 20))])
def test_killed_at_a_random_moment(seed, tmp_path, undisturbed):
    whole, seconds = undisturbed
    folder = tmp_path / "run"
    child = forked(folder)
    time.sleep(random.Random(seed).uniform(0, seconds))  # also before the first step, or while a checkpoint is written
    child.kill()
    child.join()
    again = forked(folder)
    again.join(240)
    assert again.exitcode == 0
    assert steps(folder) == steps(whole)
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (folder / "val.json").read_bytes() == (whole / "val.json").read_bytes()


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, whole):
    folder = tmp_path / "run"
    kill_after(folder, 2)
    kill_after(folder, 5, "--resume")
    kill_after(folder, 9, "--resume")
    train(folder, "--resume")
    check(folder, whole)


def test_out_and_resume_are_enough_and_a_finished_run_stays(tmp_path, whole, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    main(["train", f"--out={folder}", "--resume"])
    assert capsys.readouterr().out == ""
    assert "the run is finished: 12 steps were done" in (folder / "train.log").read_text()
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    check(folder, whole)
