"""A whole training run: its folder, existing runs, resuming, order of the data, averages, starting from another run."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from segvit.contracts import UserError
from segvit.data.transforms import Augment
from segvit.engine.run import locked
from segvit.engine.settings import Optim
from segvit.engine.state import read_state
from segvit.model_folder import load_model
from segvit.tasks import dense
from segvit.tasks import run as run_module
from segvit.tasks.dense import build_model, train
from segvit.tasks.experiment import Experiment, Input
from segvit.zoo import create_model
from tests.tasks.tiny import DATA, OPTIONS, experiment, history, steps

FILES = {
    "config.yaml", "env.json", "data_report.json", "train.log", "metrics.jsonl", "metrics.csv", "val.json",
    "checkpoints/last/state.pt", "checkpoints/previous/state.pt", "checkpoints/best/state.pt", "report/index.html",
    "model/config.json",
    "model/model.safetensors", "model/preprocessor_config.json", "model/README.md", ".lock",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of six steps; tests that write take a copy."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    train(experiment(folder, val_every=3))
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def content(folder, *names):
    return {name: (folder / name).read_bytes() for name in names}


def folder_data(root, names, *, size=32, images=3, ignored=False):
    """Two folders with a class table of their own."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(images):
            picture = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
            picture.save(root / "images" / split / f"{i}.png")
            mask = rng.integers(0, len(names), (size // 8, size // 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            if ignored and split == "val":
                mask[:] = 255
            Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(names))
    return str(root)


def test_the_run_folder_holds_what_the_design_says(finished):
    found = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert found == FILES
    assert json.loads((finished / "data_report.json").read_text())["splits"] == {"train": 12, "val": 4}
    assert json.loads((finished / "env.json").read_text())["torch"] == torch.__version__
    assert "6 steps of 4 images on cpu in fp32" in (finished / "train.log").read_text()
    page = (finished / "report" / "index.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "data:image/" in page


def test_the_configuration_is_complete_and_gives_the_experiment_back(finished):
    stored = yaml.safe_load((finished / "config.yaml").read_text())
    assert stored.keys() == Experiment.__dataclass_fields__.keys()
    assert (stored["data"], stored["options"], stored["steps"]) == (DATA, OPTIONS, 6)


def test_metrics_have_one_line_a_step_and_the_validations(finished):
    rows = history(finished)
    assert [(row["step"], "val" in row) for row in rows] == [
        (1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (6, False), (6, True),
    ]  # fmt: skip
    for row in steps(finished):
        assert row["loss"] == pytest.approx(sum(value for name, value in row.items() if name.startswith("loss_")))
        assert math.isfinite(row["grad_norm"])
    assert rows[-1]["val"].keys() == {"miou", "macc", "aacc"}


def test_the_model_is_the_best_one_and_its_figures_are_reported(finished):
    best = max((row for row in history(finished) if "val" in row), key=lambda row: row["val"]["miou"])
    assert json.loads((finished / "val.json").read_text())["miou"] == pytest.approx(best["val"]["miou"])
    state = read_state(finished / "checkpoints" / "best" / "state.pt")
    assert state["step"] == state["best_step"] == best["step"]
    weights = load_file(finished / "model" / "model.safetensors")
    assert weights.keys() == state["model"].keys()
    assert all(torch.equal(weights[key], value) for key, value in state["model"].items())
    model = load_model(finished)
    assert model.classes.names[0] == "grass"
    card = (finished / "model" / "README.md").read_text()
    assert f"mIoU {best['val']['miou']:.4f}" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "segvit"


def test_an_existing_run_is_refused_and_untouched(finished):
    before = content(finished, *FILES)
    with pytest.raises(UserError, match="holds a run; pass --resume to go on, --overwrite to replace it"):
        train(experiment(finished))
    assert content(finished, *FILES) == before


def test_overwrite_replaces_the_run(copy):
    train(experiment(copy, overwrite=True, steps=2, val_every=0))
    assert [row["step"] for row in steps(copy)] == [1, 2]
    assert "6 steps" not in (copy / "train.log").read_text()
    # The flag is of this call, not of the run: it must not stand against a later --resume.
    assert yaml.safe_load((copy / "config.yaml").read_text())["overwrite"] is False
    train(experiment(copy, resume=True, steps=2, val_every=0))


def test_overwrite_deletes_nothing_in_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("precious")
    train(experiment(tmp_path, overwrite=True, steps=1))
    assert (tmp_path / "model" / "mine.txt").read_text() == "precious"


HOLD = """
import sys
from pathlib import Path
from segvit.engine.run import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_is_being_written_is_refused(copy):
    before = content(copy, *FILES)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(copy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is being written by another process"):
            train(experiment(copy, resume=True, val_every=3))
        other.stdin.close()
    assert content(copy, *FILES) == before
    with locked(copy):  # neither the refusal nor the other process left a lock
        pass


def test_out_may_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file or lies below one"):
            train(experiment(out))


def test_resuming_a_finished_run_changes_no_result(copy):
    names = FILES - {"train.log", "env.json", "report/index.html", "config.yaml"}  # the copy has another out
    before = content(copy, *names)
    result = train(experiment(copy, resume=True, val_every=3))
    assert content(copy, *names) == before
    assert "the run is finished: 6 steps were done" in (copy / "train.log").read_text()
    assert result.metrics.miou == pytest.approx(json.loads(before["val.json"])["miou"])


def test_resuming_with_another_setting_names_it(copy):
    before = content(copy, *FILES)
    changed = experiment(copy, resume=True, batch_size=6, optim=Optim(lr=0.002))
    with pytest.raises(UserError, match=r"batch_size: 4 -> 6; optim.lr: 0.001 -> 0.002\); resume with the same ones"):
        train(changed)
    assert content(copy, *FILES) == before


def test_a_finished_run_may_be_made_longer(copy):
    train(experiment(copy, resume=True, val_every=3, steps=8, workers=1))
    assert [row["step"] for row in steps(copy)] == list(range(1, 9))


def test_resume_without_a_checkpoint_starts_over(tmp_path, monkeypatch):
    def killed(self, *, best):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dense.Run, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(experiment(tmp_path / "a", checkpoint_every=3))
    assert [row["step"] for row in steps(tmp_path / "a")] == [1, 2, 3]
    train(experiment(tmp_path / "a", resume=True, checkpoint_every=3))
    assert [row["step"] for row in steps(tmp_path / "a")] == [1, 2, 3, 4, 5, 6]
    assert "no checkpoint was written yet; starting from the beginning" in (tmp_path / "a" / "train.log").read_text()


def test_resume_of_a_run_that_never_began_starts_it(tmp_path):
    assert train(experiment(tmp_path / "new", resume=True, steps=1)).best_step == 1


def test_the_same_experiment_gives_the_same_run(finished, tmp_path):
    train(experiment(tmp_path / "b", val_every=3))
    assert steps(tmp_path / "b") == steps(finished)
    weights = "model/model.safetensors"
    assert (tmp_path / "b" / weights).read_bytes() == (finished / weights).read_bytes()


def test_workers_and_validation_change_nothing(finished, tmp_path):
    train(experiment(tmp_path / "b", val_every=0, workers=2))
    assert steps(tmp_path / "b") == steps(finished)


def test_another_seed_gives_another_run(finished, tmp_path):
    train(experiment(tmp_path / "b", seed=1, steps=1))
    assert steps(tmp_path / "b")[0]["loss"] != steps(finished)[0]["loss"]


def test_the_average_is_what_is_saved(finished, tmp_path):
    train(experiment(tmp_path / "b", ema=0.5, val_every=0))
    assert [row["loss"] for row in steps(tmp_path / "b")] == [row["loss"] for row in steps(finished)]
    weights = load_file(tmp_path / "b" / "model" / "model.safetensors")
    state = read_state(tmp_path / "b" / "checkpoints" / "last" / "state.pt")
    assert weights.keys() == state["model"].keys()
    assert all(torch.equal(state["average"][f"module.{key}"], value) for key, value in weights.items())
    assert any(not torch.equal(state["model"][key], value) for key, value in weights.items())


def test_an_averaged_run_resumes_exactly(tmp_path):
    settings = {"ema": 0.9, "val_every": 0, "checkpoint_every": 3}
    train(experiment(tmp_path / "a", **settings))

    def stop(step):
        if step == 4:
            raise KeyboardInterrupt

    after = dense.Run.after
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dense.Run, "after", lambda run, step: (stop(step), after(run, step)))
        with pytest.raises(KeyboardInterrupt):
            train(experiment(tmp_path / "b", **settings))
    torch.rand(3)  # the state of this process must not matter
    train(experiment(tmp_path / "b", **settings, resume=True))
    assert steps(tmp_path / "b") == steps(tmp_path / "a")
    weights = "model/model.safetensors"
    assert (tmp_path / "b" / weights).read_bytes() == (tmp_path / "a" / weights).read_bytes()


def test_bf16_on_the_cpu(tmp_path):
    train(experiment(tmp_path / "a", precision="bf16", steps=3))
    assert all(math.isfinite(row["loss"]) for row in steps(tmp_path / "a"))
    assert "in bf16" in (tmp_path / "a" / "train.log").read_text()
    weights = load_file(tmp_path / "a" / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_bf16_learns_what_fp32_learns(tmp_path):
    settings = {"options": OPTIONS | {"dropout": 0.0, "drop_path": 0.0}, "steps": 50, "val_every": 0}
    for precision in ("fp32", "bf16"):
        train(experiment(tmp_path / precision, precision=precision, **settings))
    full, half = ([row["loss"] for row in steps(tmp_path / precision)] for precision in ("fp32", "bf16"))
    assert full[-1] < 0.5 * full[0]
    # At most 1 % apart at every one of the 50 steps; 0.2 % was measured.
    assert half == pytest.approx(full, rel=0.01)


def test_one_run_in_fp32_follows_one_in_bf16(finished, tmp_path):
    train(experiment(tmp_path / "b", steps=1))
    assert "in fp32" in (tmp_path / "b" / "train.log").read_text()
    assert steps(tmp_path / "b")[0]["loss"] == steps(finished)[0]["loss"]


def test_init_takes_the_head_by_class_name(finished, tmp_path):
    names = ["snow", "water", "grass"]  # one new class, two old ones in another order
    started = experiment(tmp_path / "b", data=folder_data(tmp_path / "data", names), init=str(finished), steps=1)
    classes = dense.open_dataset(started.data).classes
    model, source = build_model(started, classes).state_dict(), load_model(finished).state_dict()
    torch.manual_seed(0)
    fresh = build_model(replace(started, init=None), classes).state_dict()
    old = load_model(finished).classes.names
    assert torch.equal(model["head.queries"][1], source["head.queries"][old.index("water")])
    assert torch.equal(model["head.queries"][2], source["head.queries"][old.index("grass")])
    # The row of "no object" stands last in both.
    assert torch.equal(model["head.class_embed.weight"][3], source["head.class_embed.weight"][8])
    assert torch.equal(model["head.class_embed.bias"][[1, 2]], source["head.class_embed.bias"][[2, 0]])
    assert not any(torch.equal(model["head.queries"][0], row) for row in source["head.queries"])
    assert model["head.queries"].shape == fresh["head.queries"].shape
    body = [key for key in source if key not in ("head.queries", "head.class_embed.weight", "head.class_embed.bias")]
    assert all(torch.equal(model[key], source[key]) for key in body)
    train(started)
    assert load_model(tmp_path / "b").classes.names == tuple(names)


def test_resuming_needs_the_run_that_it_started_from_no_more(finished, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(finished, source)
    started = experiment(tmp_path / "b", init=str(source), steps=2, checkpoint_every=1)
    train(started)
    shutil.rmtree(source)
    result = train(replace(started, resume=True, steps=3))
    assert [row["step"] for row in steps(tmp_path / "b")] == [1, 2, 3]
    assert result.folder == tmp_path / "b"


def test_init_from_another_architecture_is_refused(finished, tmp_path):
    other = experiment(tmp_path / "b", init=str(finished), options=OPTIONS | {"layers": 2})
    with pytest.raises(UserError, match="have different parts; use --init with the same model"):
        train(other)
    with pytest.raises(UserError, match="use the same options, image_size included"):
        train(experiment(tmp_path / "b", init=str(finished), options=OPTIONS | {"image_size": 64}))
    with pytest.raises(UserError, match="nowhere"):
        train(experiment(tmp_path / "b", init=str(tmp_path / "nowhere")))
    assert not (tmp_path / "b").exists()


def test_data_without_validation_keeps_the_last_weights(tmp_path):
    data = folder_data(tmp_path / "data", ["a", "b"])
    for kind in ("images", "masks"):
        shutil.rmtree(tmp_path / "data" / kind / "val")
    result = train(experiment(tmp_path / "run", data=data, steps=2))
    assert result.metrics is None
    state = read_state(tmp_path / "run" / "checkpoints" / "last" / "state.pt")
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in state["model"].items())
    assert not (tmp_path / "run" / "val.json").exists()


def test_validation_with_nothing_but_ignored_pixels_still_leaves_a_model(tmp_path):
    data = folder_data(tmp_path / "data", ["a", "b"], ignored=True)
    train(experiment(tmp_path / "run", data=data, steps=2, val_every=1))
    assert json.loads((tmp_path / "run" / "val.json").read_text())["miou"] is None
    load_model(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 7}, "has 8 classes, the recipe expects 7; correct the class table, or set num_classes to"),
        ({"model": "segvit_vit_tyny"}, "unknown model 'segvit_vit_tyny'; did you mean segvit_vit_tiny"),
        ({"options": {"depht": 2}}, "has no option 'depht'; did you mean depth"),
        ({"loss": {"dise_weight": 1.0}}, "has no loss option 'dise_weight'; it has class_weight, mask_weight, dice_"),
        ({"data": "synthetic:circles"}, "no such generated dataset; there is synthetic:shapes"),
        ({"data": "nowhere"}, "nowhere: no such file"),
        ({"input": Input(window=(16, 16))}, "window and stride go together"),
        ({"input": Input(window=(16, 16), stride=(16, 20))}, "must lie between 1 and the window"),
        ({"device": "cuda"}, "torch sees no GPU"),
        ({"precision": "fp16"}, "precision fp16 needs a GPU; on the CPU use --precision bf16 or fp32"),
        ({"optim": Optim(freeze=["backbon3"])}, "'backbon3' matches no parameter; there are backbone"),
        ({"model": "ddrnet_23_slim", "options": {}, "optim": Optim(layer_decay=0.9)}, "set optim.layer_decay to null"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named_before_anything_is_written(changes, message, tmp_path):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        train(experiment(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5, "accumulate": 2}, "batch_size 5 must be a multiple of accumulate 2"),
        ({"epochs": 2.0}, "give steps or epochs, exactly one; got steps=6, epochs=2.0"),
        ({"steps": None}, "give steps or epochs, exactly one; got steps=None, epochs=None"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"ema": 2.0}, r"ema must be in \[0, 1\), such as 0.999, got 2.0"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"optim": Optim(layer_decay=1.5)}, r"optim.layer_decay must be in \(0, 1\], such as 0.75, got 1.5"),
    ],
)
def test_contradictions_are_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        experiment(tmp_path, **changes)


def test_the_batch_divides_into_processes_and_micro_batches():
    class Second:
        """The second of three processes."""

        num_processes, process_index = 3, 1

    run = experiment("x", batch_size=12, accumulate=2)
    assert list(run_module.draw_lists(run, Second(), 1, 3)) == [[14, 15], [20, 21], [26, 27], [32, 33]]
    with pytest.raises(UserError, match="batch_size 8 must be a multiple of accumulate x processes = 6"):
        list(run_module.draw_lists(experiment("x", batch_size=8, accumulate=2), Second(), 0, 1))


def test_a_batch_is_used_once_at_each_of_its_passes(tmp_path):
    class Only:
        """The only process."""

        num_processes, process_index = 1, 0

    run = experiment("x", batch_size=2, augment=Augment(passes=(0.75, 1.25)))
    wanted = [[(0, 0.75), (1, 0.75)], [(0, 1.25), (1, 1.25)], [(2, 0.75), (3, 0.75)]]
    assert list(run_module.draw_lists(run, Only(), 0, 3)) == wanted
    assert list(run_module.draw_lists(run, Only(), 1, 3)) == wanted[1:]  # as a resumed run goes on
    epochs = experiment("x", steps=None, epochs=2, batch_size=4, augment=Augment(passes=(0.75, 1.25)))
    assert epochs.total_steps(12) == 12


def test_epochs_are_passes_over_the_images():
    assert experiment("x", steps=None, epochs=2.5, batch_size=4).total_steps(12) == 8
    assert experiment("x", steps=None, epochs=0.1, batch_size=4).total_steps(12) == 1


def test_accumulation_draws_the_same_images(tmp_path):
    data = {"options": OPTIONS | {"dropout": 0.0, "drop_path": 0.0}, "steps": 2}
    train(experiment(tmp_path / "one", **data))
    train(experiment(tmp_path / "four", **data, accumulate=4))
    for one, four in zip(steps(tmp_path / "one"), steps(tmp_path / "four"), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_a_nan_loss_keeps_the_checkpoint_and_frees_the_run(tmp_path, monkeypatch):
    def poisoned(*args, **kwargs):
        model = create_model(*args, **kwargs)
        calls = []

        def hook(module, inputs, out):
            calls.append(1)
            poison = float("nan") if module.training and len(calls) > 5 else 0.0  # two measure the memory
            return out._replace(extras={k: v + poison for k, v in out.extras.items()})

        model.register_forward_hook(hook)
        return model

    monkeypatch.setattr(dense, "create_model", poisoned)
    with pytest.raises(UserError, match=r"the loss is nan at step 4 .*train_000"):
        train(experiment(tmp_path / "a", checkpoint_every=2))
    assert read_state(tmp_path / "a" / "checkpoints" / "last" / "state.pt")["step"] == 2
    monkeypatch.undo()
    train(experiment(tmp_path / "a", checkpoint_every=2, resume=True))
    assert [row["step"] for row in steps(tmp_path / "a")] == [1, 2, 3, 4, 5, 6]


def test_data_is_found_again_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert dense.located("mine") == str(tmp_path / "mine")
    assert dense.located("voc12:VOC2012") == f"voc12:{tmp_path / 'VOC2012'}"
    assert dense.located("synthetic:shapes?train=4") == "synthetic:shapes?train=4"


def test_frozen_parts_are_named_and_stay(tmp_path):
    optim = Optim(lr=0.001, freeze=["patch_embed", r"blocks\.0"], layer_decay=0.5)
    train(experiment(tmp_path / "a", optim=optim, steps=2, val_every=0))
    trained = load_model(tmp_path / "a")
    torch.manual_seed(0)
    fresh = build_model(experiment("x"), trained.classes).state_dict()
    moved = {key for key, value in trained.state_dict().items() if not torch.equal(value, fresh[key])}
    assert any(key.startswith("backbone.blocks.1.") for key in moved)
    assert not any(key.startswith(("backbone.patch_embed.", "backbone.blocks.0.")) for key in moved)
    log = (tmp_path / "a" / "train.log").read_text()
    assert "M parameters train (frozen: backbone.patch_embed, backbone.blocks.0); 12 training" in log
    for row in steps(tmp_path / "a"):
        assert row["lr_max"] == pytest.approx(10 * 2**3 * row["lr"])  # the head against the position embedding
