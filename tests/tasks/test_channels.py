"""Images that are not RGB, from the files through training to a saved model that predicts the same."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from segvit.cli import main
from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.inference.predictor import Predictor
from segvit.model_folder import load_model
from segvit.tasks.dense import train
from segvit.tasks.experiment import Input
from tests.data.folders import save
from tests.tasks.tiny import OPTIONS, experiment, write_recipe

tifffile = pytest.importorskip("tifffile")
RANGE = [100, 4000]


@pytest.fixture(params=[1, 5])
def channels(request):
    return request.param


@pytest.fixture
def data(tmp_path, channels):
    """Eight images of 12-bit levels in TIFFs of 16 bits, described by a YAML."""
    rng = np.random.default_rng(channels)
    for split, count in (("train", 6), ("val", 2)):
        for i in range(count):
            mask = (np.add.outer(np.arange(40), np.arange(36)) // (9 + i)) % 3
            path = tmp_path / "data" / "images" / split / f"{i}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            levels = mask[..., None] * 1500 + rng.integers(0, 900, (40, 36, channels))
            kept = {} if channels == 1 else {"planarconfig": "contig"}
            tifffile.imwrite(path, levels.astype(np.uint16).squeeze(), photometric="minisblack", **kept)
            save(tmp_path / "data" / "masks" / split / f"{i}.png", mask.astype(np.uint8))
    (tmp_path / "data" / "dataset.yaml").write_text(yaml.safe_dump({
        **{split: {"images": f"images/{split}", "masks": f"masks/{split}"} for split in ("train", "val")},
        "classes": {0: "a", 1: "b", 2: "c"}, "channels": channels, "range": RANGE,
    }))  # fmt: skip
    return str(tmp_path / "data")


def test_train_save_load_predict(data, channels, tmp_path):
    mean, std = (0.3,) * channels, (0.25,) * channels
    run = experiment(tmp_path / "run", data=data, steps=2, input=Input(mean=mean, std=std), cache="ram")
    result = train(run)
    assert result.metrics.counted == 3
    model = load_model(tmp_path / "run")
    assert model.config.options["in_channels"] == channels
    assert (model.spec.mean, model.spec.std, model.spec.levels) == (mean, std, tuple(RANGE))
    dataset, predictor = open_dataset(data), Predictor(model)
    sample = dataset.read("val", 1)
    again = Predictor(load_model(tmp_path / "run" / "model"))
    from_file = again(dataset.image_path("val", 1), scores=True)
    np.testing.assert_array_equal(from_file.image, sample.image)
    np.testing.assert_array_equal(from_file.scores, predictor(sample.image, scores=True).scores)
    assert from_file.overlay().mode == "RGB"
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    train(replace(run, resume=True, cache="none"))  # where decoded images are kept is no part of the run


def test_the_model_must_be_for_the_channels_of_the_data(data, channels, tmp_path):
    with pytest.raises(UserError, match=f"in_channels is 4 but the images have {channels} channels"):
        train(experiment(tmp_path / "run", data=data, options=OPTIONS | {"in_channels": 4}))
    with pytest.raises(UserError, match=rf"have 3 values but the model takes {channels} channels"):
        train(experiment(tmp_path / "run", data=data, input=Input(mean=(0.5,) * 3, std=(0.5,) * 3)))
    with pytest.raises(UserError, match=f"mean has 2 values and std {channels}"):
        train(experiment(tmp_path / "run", data=data, input=Input(mean=(0.5,) * 2)))
    assert not (tmp_path / "run").exists()
    plain = experiment(tmp_path / "run")
    assert plain.for_channels(3) is plain  # recipes for RGB stay as they are written


@pytest.mark.parametrize(("suffix", "bits"), [("png", 8), ("png", 16), ("tif", 16)])
def test_grey_files_through_the_commands(suffix, bits, tmp_path, capsys):
    """Train, val and predict read the same levels: what 8 bits hold when 16 bits are the same picture."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            mask = (np.add.outer(np.arange(40), np.arange(36)) // (9 + i)) % 3
            grey = (mask * 80 + rng.integers(0, 60, mask.shape)).astype(np.uint8)
            values = grey if bits == 8 else grey.astype(np.uint16) * 257
            save(tmp_path / "data" / "images" / split / f"{i}.{suffix}", values)
            save(tmp_path / "data" / "masks" / split / f"{i}.png", mask.astype(np.uint8))
    (tmp_path / "data" / "dataset.yaml").write_text(yaml.safe_dump({
        **{split: {"images": f"images/{split}", "masks": f"masks/{split}"} for split in ("train", "val")},
        "classes": {0: "a", 1: "b", 2: "c"}, "channels": 1,
    }))  # fmt: skip
    recipe = write_recipe(tmp_path / "recipe.yaml", data=str(tmp_path / "data"), steps=2)
    main(["train", "--config", str(recipe), "--out", str(tmp_path / "run")])
    main(["val", str(tmp_path / "run"), "--workers", "0", "--json"])
    report = json.loads(capsys.readouterr().out)
    image = tmp_path / "data" / "images" / "val" / f"1.{suffix}"
    main(["predict", str(image), "--model", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    with Image.open(tmp_path / "out" / "1.png") as found:
        labels = np.array(found)
    model = load_model(tmp_path / "run")
    assert model.spec.channels == 1
    np.testing.assert_array_equal(labels, Predictor(model).segment(grey[..., None])[0])
    assert report["miou"] == json.loads((tmp_path / "run" / "val.json").read_text())["miou"]
