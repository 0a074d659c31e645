"""The memory of a run: the batch that auto chooses, what is said before the first step, and when memory runs out."""

import json

import pytest
import torch
import yaml

from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.engine import memory as engine_memory
from segvit.engine.memory import amount
from segvit.tasks import dense
from segvit.tasks import memory as tasks_memory
from segvit.tasks.dense import build_model, train
from segvit.tasks.memory import fullest_crop, measure, memory_text, out_of_memory, settle_batch
from segvit.tasks.run import make_accelerator
from tests.tasks.tiny import DATA, OPTIONS, experiment, steps


def setting(tmp_path, **changes):
    run = experiment(tmp_path / "run", **changes)
    dataset = open_dataset(run.data)
    return run, dataset, build_model(run, dataset.classes), make_accelerator(run)


def free(monkeypatch, size):
    monkeypatch.setattr(engine_memory, "available_memory", lambda: size)


def test_auto_takes_what_fits_and_the_run_keeps_it(tmp_path, monkeypatch):
    run, dataset, model, accelerator = setting(tmp_path)
    need = measure(run, dataset, model, accelerator)
    free(monkeypatch, int((need.coming(7) + 10) / 0.8))
    auto = experiment(tmp_path / "run", batch_size="auto", steps=4, val_every=0)
    train(auto)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["batch_size"] == 6
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"batch_size auto: 6 images at 32x32 with {amount(need.image)} each (80 % of the" in log
    assert "4 steps of 6 images on cpu" in log
    free(monkeypatch, 1e12)  # a resumed run does not choose anew, whatever is free now
    train(experiment(tmp_path / "run", batch_size="auto", steps=5, val_every=0, resume=True))
    assert [row["step"] for row in steps(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["batch_size"] == 6


def test_auto_takes_no_more_images_than_there_are(tmp_path, monkeypatch):
    free(monkeypatch, 10**12)
    chosen = settle_batch(*auto_setting(tmp_path, accumulate=1))
    assert chosen.experiment.batch_size == 12
    assert "auto takes at most 64 images, or all there are; 1000 GB are free" in chosen.text
    assert settle_batch(*auto_setting(tmp_path, accumulate=5)).experiment.batch_size == 10
    many = settle_batch(*auto_setting(tmp_path, data=DATA.replace("train=12", "train=500")))
    assert many.experiment.batch_size == 64


def auto_setting(tmp_path, **changes):
    run, dataset, model, accelerator = setting(tmp_path, batch_size="auto", **changes)
    return run, tmp_path / "run", dataset, model, accelerator


def test_auto_needs_to_know_what_is_free(tmp_path, monkeypatch):
    free(monkeypatch, None)
    with pytest.raises(UserError, match="the system does not say; give it"):
        settle_batch(*auto_setting(tmp_path))


def test_every_process_takes_the_least_of_all(tmp_path, monkeypatch):
    class Two:
        """The first of two processes; the other one has room for four images only."""

        num_processes, process_index, device, mixed_precision = 2, 0, torch.device("cpu"), "no"

        def gather(self, mine):
            assert int(mine) == 12
            return torch.cat([mine, torch.tensor([4])])

    free(monkeypatch, 10**12)
    run, folder, dataset, model, _ = auto_setting(tmp_path)
    assert settle_batch(run, folder, dataset, model, Two()).experiment.batch_size == 4


def test_a_given_batch_is_not_measured(tmp_path):
    run, dataset, model, accelerator = setting(tmp_path)
    assert settle_batch(run, tmp_path, dataset, model, accelerator) == (run, None, "")


def test_auto_is_for_training_only(tmp_path):
    auto = experiment(tmp_path, batch_size="auto", steps=None, epochs=2)
    with pytest.raises(UserError, match="batch_size auto is chosen by `segvit train`"):
        auto.total_steps(images=12)


def test_the_crop_with_the_most_classes_is_measured(tmp_path):
    run, dataset, model, _ = setting(tmp_path)
    batch = fullest_crop(run, dataset, model.spec)
    assert batch.images.shape == (1, 3, 32, 32)
    assert len(batch.masks.unique()) >= 3


def test_the_run_says_what_it_takes(tmp_path, monkeypatch):
    run, dataset, model, accelerator = setting(tmp_path, accumulate=2)
    need = measure(run, dataset, model, accelerator)
    free(monkeypatch, 20 * 10**9)
    text = memory_text(run, need, accelerator)
    assert text == f"memory: about {need.text(2)}; 20 GB free"
    free(monkeypatch, 10)
    assert memory_text(run, need, accelerator).endswith("; warning: this will hardly fit")
    free(monkeypatch, None)
    assert memory_text(run, need, accelerator).endswith("; nobody knows how much is free")


def test_memory_that_runs_out_in_training_is_explained_by_measures(tmp_path, monkeypatch):
    real, calls = dense.Run.after, []

    def after(self, step):
        calls.append(step)
        if step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        real(self, step)

    monkeypatch.setattr(dense.Run, "after", after)
    free(monkeypatch, 5 * 10**9)
    with pytest.raises(UserError) as caught:
        train(experiment(tmp_path / "run", steps=4, ema=0.9))
    assert calls == [1, 2]
    monkeypatch.undo()
    free(monkeypatch, 5 * 10**9)
    run, dataset, model, accelerator = setting(tmp_path, ema=0.9)
    need = measure(run, dataset, model, accelerator)
    message = str(out_of_memory(run, dataset, model, accelerator, need))
    assert str(caught.value) == message
    assert message.startswith(f"out of memory at batch 4 of 32x32 (needs about {amount(need.total(4))}, 5.0 GB free): ")
    assert f"--accumulate 2 saves {amount(2 * need.image)}, " in message
    again = build_model(experiment("x", options=OPTIONS | {"checkpointing": True}), dataset.classes)
    saved = need.total(4) - measure(run, dataset, again, accelerator).total(4)
    assert f"--options.checkpointing true saves {amount(saved)}, " in message
    assert "--precision bf16 saves " in message
    assert message.endswith(", or a smaller augment.crop or batch_size")


def test_only_options_that_exist_and_help_are_named(tmp_path):
    run, dataset, model, accelerator = setting(
        tmp_path, model="ddrnet_23_slim", options={}, batch_size=2, precision="bf16"
    )
    need = measure(run, dataset, model, accelerator)
    message = str(out_of_memory(run, dataset, model, accelerator, need))
    assert "checkpointing" not in message
    assert "bf16" not in message
    assert "--accumulate 2 saves" in message


def test_a_crop_that_never_fits_is_said_at_once(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(tasks_memory.memory, "peak_bytes", full)
    with pytest.raises(UserError, match=r"not even one or two crops of 32x32 fit, .* free; use a smaller model or"):
        train(experiment(tmp_path / "run"))


def test_the_summary_stands_before_the_first_step(tmp_path):
    train(experiment(tmp_path / "run", steps=8))
    lines = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert "M parameters train; 12 training and 4 validation images, 8 classes; 8 steps of 4 images" in lines[0]
    assert "memory: about" in lines[1]
    assert any("s a step: about" in line and "for the 2 steps left" in line for line in lines)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["lr_max"] == pytest.approx(10 * row["lr"]) for row in rows if "lr" in row)
