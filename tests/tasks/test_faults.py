"""What can go wrong in a night: each fault ends in one line that says what to do, and the run can go on."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils.data import get_worker_info

from segvit.cli import main
from segvit.contracts import UserError
from segvit.data.loading import Draws
from segvit.engine.interrupt import Stopped
from segvit.engine.state import read_state
from segvit.tasks import dense
from segvit.tasks.dense import train
from tests.tasks.tiny import command, environment, experiment, steps, write_recipe

LAST, PREVIOUS = "checkpoints/last/state.pt", "checkpoints/previous/state.pt"
WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps without any fault."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(experiment(folder, steps=8, checkpoint_every=2, val_every=0))
    return folder


def settings(**more):
    return {"steps": 8, "checkpoint_every": 2, "val_every": 0} | more


def stopped_at(step, folder, monkeypatch, **more):
    """Train and stop as if killed, after a step was counted and saved."""
    after = dense.Run.after

    def stop(run, now):
        after(run, now)
        if now == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dense.Run, "after", stop)
        with pytest.raises(KeyboardInterrupt):
            train(experiment(folder, **settings(**more)))


def assert_finishes_like(folder, whole, **more):
    train(experiment(folder, **settings(resume=True, **more)))
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert steps(folder) == steps(whole)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, whole, monkeypatch):
    stopped_at(6, tmp_path / "run", monkeypatch)
    assert read_state(tmp_path / "run" / PREVIOUS)["step"] == 4
    content = (tmp_path / "run" / LAST).read_bytes()
    (tmp_path / "run" / LAST).write_bytes(content[: len(content) // 2])
    assert_finishes_like(tmp_path / "run", whole)
    said = (tmp_path / "run" / "train.log").read_text()
    assert "damaged" in said
    assert "previous/state.pt instead" in said
    assert "resumed at step 4" in said


def test_a_kill_between_two_renames_loses_one_save_only(tmp_path, whole, monkeypatch):
    stopped_at(6, tmp_path / "run", monkeypatch)
    (tmp_path / "run" / LAST).rename(tmp_path / "run" / f"{LAST}.new")  # the moment before it took its name
    assert_finishes_like(tmp_path / "run", whole)
    assert "resumed at step 4" in (tmp_path / "run" / "train.log").read_text()


def test_all_checkpoints_damaged_is_one_line(tmp_path, monkeypatch):
    stopped_at(4, tmp_path / "run", monkeypatch)
    for place in (LAST, PREVIOUS):
        (tmp_path / "run" / place).write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        train(experiment(tmp_path / "run", **settings(resume=True)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on(number, tmp_path, whole, monkeypatch):
    after, handler = dense.Run.after, signal.getsignal(number)

    def ask(run, now):
        if now == 3:
            os.kill(os.getpid(), number)
        after(run, now)

    with monkeypatch.context() as patched:
        patched.setattr(dense.Run, "after", ask)
        with pytest.raises(Stopped) as stopped:
            train(experiment(tmp_path / "run", **settings()))
    assert stopped.value.code == 128 + number
    assert read_state(tmp_path / "run" / LAST)["step"] == 3
    assert "stopped at step 3 as asked; everything is saved" in (tmp_path / "run" / "train.log").read_text()
    assert signal.getsignal(number) == handler
    assert_finishes_like(tmp_path / "run", whole)


def test_in_a_thread_signals_are_left_alone(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train, args=(experiment(tmp_path / "run", steps=1),))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "run" / WEIGHTS).is_file()


def test_sigterm_to_a_real_process_ends_with_its_code(tmp_path):
    folder = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", steps=100_000, checkpoint_every=100_000, val_every=0)
    arguments = command("train", "--config", recipe, "--out", folder)
    with subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text().count("\n"):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == 143
    assert read_state(folder / LAST)["step"] == len(steps(folder))


class DyingDraws(Draws):
    """Samples of which one kills the worker that makes it, as the kernel does when memory runs out."""

    def __getitem__(self, draw):
        if draw == 6 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(draw)


def test_a_killed_loader_worker_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("segvit.data.loading.Draws", DyingDraws)
    with pytest.raises(UserError, match=r"a loader process .*--workers"):
        train(experiment(tmp_path / "run", steps=6, workers=1))


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "run" / "config.yaml"))

    monkeypatch.setattr("segvit.engine.run.write_text", refuse)
    recipe = write_recipe(tmp_path / "recipe.yaml", steps=1)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(recipe), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "Permission denied" in last
    assert "config.yaml" in last


def test_a_clock_that_jumps_changes_nothing(tmp_path, whole, monkeypatch):
    real, calls = time.time, []

    def jumping():
        calls.append(1)
        return real() - 1e9 * (len(calls) % 2)

    monkeypatch.setattr(time, "time", jumping)
    train(experiment(tmp_path / "run", **settings()))
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_checkpoint_of_another_version_is_named(tmp_path, monkeypatch):
    stopped_at(2, tmp_path / "run", monkeypatch)
    state = read_state(tmp_path / "run" / LAST)
    torch.save(state | {"format": 99}, tmp_path / "run" / LAST)
    with pytest.raises(UserError, match=r"written by another version of segvit \(format 99, here 1\)"):
        train(experiment(tmp_path / "run", **settings(resume=True)))


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
from segvit.engine.sharding import full, shard, whole_model_state
from segvit.zoo import create_model

dist.init_process_group("gloo")
torch.manual_seed(0)
options = {"image_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "out_indices": [0, 1], "layers": 1}
model = create_model("segvit_vit_tiny", num_classes=5, **options)
before = {name: value.clone() for name, value in model.state_dict().items()}
shard(model, torch.device("cpu"))
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
mine = sum(parameter.to_local().numel() for parameter in model.parameters())
total = sum(parameter.numel() for parameter in model.parameters())
assert mine < 0.6 * total, (mine, total)
model(torch.rand(2, 3, 32, 32)).logits.square().mean().backward()
assert all(isinstance(parameter.grad, DTensor) for parameter in model.parameters() if parameter.grad is not None)
whole = whole_model_state(model)
assert whole.keys() == before.keys()
assert all(torch.equal(whole[name], value) for name, value in before.items())
print("sharded", dist.get_rank(), flush=True)
dist.destroy_process_group()
"""


def launch(*arguments, timeout=200):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
         "--rdzv_endpoint=localhost:0", *map(str, arguments)],
        env=environment(), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def test_parameters_are_really_spread_over_the_processes(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    done = launch(script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("sharded") == 2


FAILING = """
import os, signal, sys
import torch
from segvit.cli import main
from segvit.tasks import run as module

how, rank = sys.argv.pop(1), int(os.environ["RANK"])
original = module.fit

def fit(model, optimizer, batches, **rest):
    def spoiled():
        for number, parts in enumerate(batches):
            if number == 2 and rank == 1:
                if how == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                parts = [batch._replace(images=batch.images * float("nan")) for batch in parts]
            yield parts
    original(model, optimizer, spoiled(), **rest)

module.fit = fit
main(sys.argv[1:])
"""


@pytest.mark.parametrize("how", ["die", "nan"])
def test_a_process_that_fails_ends_the_job_and_nothing_hangs(how, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    recipe = write_recipe(tmp_path / "recipe.yaml", steps=50, val_every=0, checkpoint_every=1)
    done = launch(script, how, "train", "--config", recipe, "--out", tmp_path / "run", timeout=120)
    assert done.returncode != 0
    if how == "nan":
        assert "the loss is nan at step 3" in done.stderr
    assert read_state(tmp_path / "run" / LAST)["step"] == 2
