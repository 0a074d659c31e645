"""The command line, as a user meets it: help, options, mistakes, results."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from segvit import __version__, cli
from segvit.contracts import UserError
from segvit.tasks.experiment import Experiment
from segvit.zoo import MODELS
from tests.tasks.tiny import DATA, command, environment, write_recipe

COMMANDS = list(cli.COMMANDS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run, made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = write_recipe(folder / "recipe.yaml", steps=2)
    cli.main(["train", "--config", str(recipe), "--out", str(folder / "run")])
    return folder / "run"


@pytest.fixture
def photos(tmp_path):
    """Three images of which two have one stem, one of them in a folder below."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "below/a.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def refused(capsys):
    """Call the command line, expect exit code 2 and one line, and return the line."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert said.out == ""
        assert said.err.startswith("segvit: ")
        assert said.err.count("\n") == 1, said.err
        assert "Traceback" not in said.err
        return said.err.strip()

    return call


@pytest.fixture
def told(capsys):
    """Call the command line and return what it wrote to stdout."""

    def call(*arguments):
        cli.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return call


@pytest.fixture
def parsed(monkeypatch):
    """The experiment that `segvit train` would run."""
    seen = []
    monkeypatch.setattr("segvit.tasks.dense.train", seen.append)

    def call(*arguments):
        cli.main(["train", *map(str, arguments)])
        return seen.pop()

    return call


# Help


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_the_overview_names_every_command(arguments, told):
    text = told(*arguments)
    for name in COMMANDS:
        assert f"\n  {name} " in text
    assert "--debug" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    text = capsys.readouterr().out
    assert not stop.value.code
    assert text.startswith(f"usage: segvit {name}")
    # Only the --config of `train` itself, the groups of options and the augmentation go without a default here.
    if name != "train":
        assert "ARG:" not in text
        blocks = text.split("options:")[-1].split("\n  --")[1:]
        assert all(len(block.split()) > 2 for block in blocks)


def test_a_group_of_commands(told):
    for arguments in (["models"], ["models", "--help"]):
        text = told(*arguments)
        assert "models licences" in text
        assert "predict" not in text


def test_version(told):
    assert told("--version") == f"{__version__}\n"


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predic"], "unknown command 'predic'; did you mean predict?"),
        (["models", "lst"], "unknown command 'models lst'; did you mean models list"),
        (["qqqq"], "did you mean train,"),
        (["predict", "a.png", "--modl", "b"], "predict: unknown option --modl; did you mean --model"),
        (["train", "--optim.lrr", "1"], "train: unknown option --optim.lrr; did you mean --optim.lr"),
        (["models", "list", "--jsn"], "unknown option --jsn; did you mean --json"),
        (["predict", "a.png"], "required: model"),
        (["predict"], "required: source, model"),
        (["train", "--data", "x", "--out", "y"], "give steps or epochs, exactly one"),
        (["train", "--data", "x", "--out", "y", "--steps", "many"], '"steps"'),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--out", "y", "--steps", "3"], "required: data"),
        (["models", "info", "segvit_vit_bsae"], "unknown model 'segvit_vit_bsae'; did you mean segvit_vit_base"),
        (["models", "info"], "give a model name or --config RECIPE"),
        (["val", "nowhere", "--data", DATA], "nowhere"),
        (["predict", "nowhere.jpg", "--model", "x"], "nowhere.jpg: no such image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback():
    with pytest.raises(UserError, match="unknown command"):
        cli.main(["predic", "--debug"])


def test_as_a_process():
    for arguments, code in ((["predic"], 2), (["--debug", "predic"], 1)):
        done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True)
        assert done.returncode == code
        assert done.stdout == ""
        assert "unknown command 'predic'; did you mean predict?" in done.stderr
        assert ("Traceback" in done.stderr) == (code == 1)


def test_a_closed_pipe_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command("--help"), env=environment(), stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert "Traceback" not in done.stderr


def test_an_interruption_has_its_own_code(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 130


# Options of train


def test_flags_are_bare_and_dashes_are_underscores(parsed, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", out="runs/x")
    assert parsed("--config", recipe, "--overwrite").overwrite is True
    assert parsed("--config", recipe, "--overwrite", "--batch-size", 8).batch_size == 8
    assert parsed("--config", recipe, "--overwrite", "false").overwrite is False
    assert parsed("--config", recipe, "--overwrite=true").overwrite is True
    assert parsed("--config", recipe, "--optim.weight-decay=0.5").optim.weight_decay == 0.5


def test_options_override_the_recipe_and_keep_the_rest(parsed, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", out="runs/x")
    experiment = parsed("--config", recipe, "--optim.lr", 0.5, "--options.depth", 3, "--augment.crop", "[16,24]")
    assert isinstance(experiment, Experiment)
    assert experiment.optim.lr == 0.5
    assert experiment.options["depth"] == 3
    assert experiment.options["embed_dim"] == 64
    assert experiment.augment.crop == (16, 24)
    assert experiment.schedule.warmup == 2


def test_steps_replace_the_recipes_epochs_and_the_reverse(parsed, refused, tmp_path):
    epochs = write_recipe(tmp_path / "epochs.yaml", out="runs/x", steps=None, epochs=5)
    steps = write_recipe(tmp_path / "steps.yaml", out="runs/x")
    found = [
        parsed("--config", epochs),
        parsed("--config", epochs, "--steps", 7),
        parsed("--config", steps, "--epochs=3"),
    ]
    assert [(one.steps, one.epochs) for one in found] == [(None, 5), (7, None), (None, 3)]
    assert "exactly one" in refused("train", "--config", steps, "--steps", 3, "--epochs", 2)


def test_the_configuration_can_be_printed_and_used_again(parsed, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "r.yaml", out="runs/x")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config", str(recipe), "--optim.lr", "0.25", "--print_config"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["optim"]["lr"] == 0.25
    assert yaml.safe_load(text).keys() == Experiment.__dataclass_fields__.keys()
    (tmp_path / "printed.yaml").write_text(text)
    assert parsed("--config", tmp_path / "printed.yaml") == parsed("--config", recipe, "--optim.lr", 0.25)


def test_a_run_with_overwrite_can_be_resumed_by_its_folder(run, parsed):
    for arguments in (["--out", run, "--resume"], [f"--out={run}", "--resume"], ["--resume", "--out", run]):
        experiment = parsed(*arguments)
        assert (experiment.resume, experiment.overwrite, experiment.out) == (True, False, str(run))
        assert experiment.steps == 2


def test_every_recipe_is_valid(parsed):
    recipes = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
    assert recipes
    for recipe in recipes:
        experiment = parsed("--config", recipe, "--data", "x", "--out", "y")
        assert experiment.model in MODELS


# Data that cannot be used


def dataset(root, *, names=("a", "b"), size=32):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind, shape, high in (("images", (size, size, 3), 256), ("masks", (size, size), 2)):
            folder = root / kind / split
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(rng.integers(0, high, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(names))
    return root


BROKEN = {
    "missing image": (lambda root: (root / "images/train/1.png").unlink(), "1 mask without an image: 1"),
    "missing mask": (lambda root: (root / "masks/train/1.png").unlink(), "1 image without a mask: 1"),
    "corrupt image": (
        lambda root: (root / "images/train/1.png").write_bytes(b"nothing"),
        "1 of 4 images cannot be read: images/train/1.png (unknown or damaged format)",
    ),
    "mask of another size": (
        lambda root: Image.new("L", (9, 7)).save(root / "masks/train/1.png"),
        "images/train/1.png is 32x32 but masks/train/1.png is 9x7",
    ),
    "ids without a class": (
        lambda root: Image.new("L", (32, 32), 77).save(root / "masks/train/0.png"),
        "values {77} are in no class: 25 % of the pixels",
    ),
    "no class table": (
        lambda root: (root / "classes.txt").unlink(),
        "nothing says which value is which class; the masks hold {0, 1}",
    ),
    "no images": (lambda root: [shutil.rmtree(root / "images"), shutil.rmtree(root / "masks")], "neither a dataset."),
    "no folder": (shutil.rmtree, "no such file"),
}


# What training itself says of files that the doctor was told not to look at, or that broke after it did.
BROKEN_LATER = {
    "corrupt image": "1.png: cannot be read as an image (unknown or damaged format)",
    "ids without a class": "ids [77] are in no class; add them to values: or ignore: in the YAML",
    "mask of another size": "is 32x32 pixels but its mask",
}


@pytest.mark.parametrize("workers", [None, 0, 1])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_is_one_line(name, workers, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    if workers is not None and name not in BROKEN_LATER:
        return  # the files do not fit together: found whenever the data is opened
    spoil, message = BROKEN[name]
    message = message if workers is None else BROKEN_LATER[name]
    spoil(dataset(tmp_path / "data"))
    recipe = write_recipe(tmp_path / "r.yaml", data=str(tmp_path / "data"), workers=workers or 0)
    more = [] if workers is None else ["--skip_check"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config", str(recipe), "--out", str(tmp_path / "run"), *more])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("segvit: ")
    assert not any("Traceback" in line for line in lines)


# val, predict


def test_val(run, told):
    text = told("val", run, "--workers", 0)
    assert "mIoU" in text
    assert "labels at the original resolution" in text
    report = json.loads(told("val", run, "--workers", 0, "--json"))
    assert report["miou"] == json.loads((run / "val.json").read_text())["miou"]
    assert (report["split"], report["data"], len(report["classes"])) == ("val", DATA, 8)


def test_val_with_views_on_other_data(run, told):
    other = "synthetic:shapes?val=2&size=40&seed=3"
    report = json.loads(told("val", run, "--data", other, "--scales", "[0.5, 1]", "--flip", "--workers", 0, "--json"))
    assert report["data"] == other
    assert "scales [0.5, 1.0] and flip" in report["protocol"]


def test_val_says_what_does_not_fit(run, refused, tmp_path):
    data = dataset(tmp_path / "data")
    assert "the model has 8 classes and the data 2" in refused("val", run, "--data", data, "--workers", 0)
    assert "no split 'test'" in refused("val", run, "--split", "test", "--workers", 0)
    assert "does not say what it was trained on; give --data" in refused("val", run / "model", "--workers", 0)


def labels(path, size=(24, 30)):
    with Image.open(path) as picture:
        assert picture.mode == "P"
        ids = np.array(picture)
    assert ids.shape == size
    assert ids.max() < 8
    return ids


def test_predict_one_file(run, photos, told, tmp_path):
    text = told("predict", photos / "b.jpg", "--model", run, "--out", tmp_path / "out")
    assert text == f"{tmp_path / 'out' / 'b.png'}\n"
    labels(tmp_path / "out" / "b.png")


def test_predict_a_folder_with_everything(run, photos, told, tmp_path):
    flags = ["--overlay", "--scores", "--areas", "--json"]
    written = json.loads(told("predict", photos, "--model", run, "--out", tmp_path / "out", *flags))
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    stems = ("a", "b", "below/a")
    ends = (".png", "_overlay.png", "_scores.npz", ".json")
    assert found == {".predict.json", *(f"{stem}{end}" for stem in stems for end in ends)}
    found.remove(".predict.json")
    assert {path for item in written for kind, path in item.items() if kind != "image"} == {
        str(tmp_path / "out" / name) for name in found
    }
    assert [item["image"] for item in written] == [str(photos / name) for name in ("a.png", "b.jpg", "below/a.png")]
    for item in written:
        ids = labels(item["labels"])
        with np.load(item["scores"]) as stored:
            scores = stored["scores"]
        assert (scores.dtype, scores.shape) == (np.float16, (8, 24, 30))
        areas = json.loads(Path(item["areas"]).read_text())
        assert {row["id"]: row["pixels"] for row in areas["classes"]} == {
            int(i): int(n) for i, n in zip(*np.unique(ids, return_counts=True), strict=True)
        }


def test_predict_a_pattern_keeps_files_of_one_name_apart(run, photos, told, tmp_path):
    text = told("predict", photos / "**" / "*.png", "--model", run, "--out", tmp_path / "out")
    assert text.split() == [str(tmp_path / "out" / "a.png"), str(tmp_path / "out" / "below" / "a.png")]
    text = told("predict", photos / "*.jpg", "--model", run, "--out", tmp_path / "two")
    assert text.split() == [str(tmp_path / "two" / "b.png")]


def test_predict_files_of_one_stem_keep_their_endings(run, photos, told, tmp_path):
    shutil.copy(photos / "b.jpg", photos / "a.jpg")
    text = told("predict", photos, "--model", run, "--out", tmp_path / "out")
    names = {"a.jpg.png", "a.png.png", "b.jpg.png", "below/a.png.png"}
    assert set(text.split()) == {str(tmp_path / "out" / name) for name in names}


def test_predict_writes_into_the_run_by_default(run, photos, told, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    assert told("predict", photos / "b.jpg", "--model", copy).split() == [str(copy / "predictions" / "b.png")]


def test_predict_never_replaces_an_input(run, photos, refused):
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    assert "would replace an input image; choose another --out" in refused(
        "predict", photos, "--model", run, "--out", photos
    )
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before


def test_predict_takes_what_a_shell_made_of_a_pattern(run, photos, tmp_path, capsys):
    names = sorted(path for path in photos.iterdir() if path.suffix == ".jpg")
    assert names
    cli.main(["predict", *map(str, [*names, photos]), "--model", str(run), "--out", str(tmp_path / "out"), "--json"])
    written = json.loads(capsys.readouterr().out)
    assert {item["image"] for item in written} >= set(map(str, names))
    assert all((tmp_path / "out" / f"{path.stem}.png").is_file() for path in names)


def test_predict_says_what_cannot_be_read(run, photos, refused, tmp_path):
    (photos / "b.jpg").write_bytes(b"not an image")
    assert "b.jpg: cannot be read as an image" in refused(
        "predict", photos / "b.jpg", "--model", run, "--out", tmp_path / "out"
    )
    (tmp_path / "empty").mkdir()
    assert "no images in it" in refused("predict", tmp_path / "empty", "--model", run)
    assert "holds no model" in refused("predict", photos / "a.png", "--model", tmp_path / "empty")
    assert "nowhere is neither a folder nor a model" in refused("predict", photos / "a.png", "--model", "nowhere")
    assert "scales must be positive" in refused("predict", photos, "--model", run, "--scales", "0")


# models, doctor


def test_models(told):
    rows = json.loads(told("models", "list", "--json"))
    assert [row["name"] for row in rows] == list(MODELS)
    assert told("models", "list").count("\n") == len(MODELS)
    info = json.loads(told("models", "info", "segvit_vit_tiny", "--num_classes", 8, "--image_size", 64, "--json"))
    assert (info["num_classes"], info["input_size"]) == (8, [64, 64])
    assert info["parameters"] > 1e6
    assert info["gflops"] > 0
    rows = json.loads(told("models", "licences", "--json"))
    assert rows[0].keys() == {"weights", "licence", "access"}


def test_models_info_of_a_recipe(told, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", num_classes=8)
    info = json.loads(told("models", "info", "--config", recipe, "--json"))
    assert (info["model"], info["num_classes"], info["input_size"]) == ("segvit_vit_tiny", 8, [32, 32])


def test_doctor(told):
    report = json.loads(told("doctor", "--json"))
    assert report["segvit"] == __version__
    assert {"python", "torch", "timm", "gpus", "cpus"} <= report.keys()
    assert f"segvit: {__version__}" in told("doctor")
