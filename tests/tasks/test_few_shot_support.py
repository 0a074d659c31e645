"""Few-shot networks with fixed supports: the same logits, files in and out, masks that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segvit import cli
from segvit.contracts import UserError
from segvit.data.episodes import fit
from segvit.inference.predictor import Predictor
from segvit.systems.few_shot import Network
from segvit.tasks.few_shot import tensors
from segvit.tasks.few_shot_models import create_few_shot, save_few_shot
from segvit.tasks.few_shot_support import read_supports, set_support

CONFIGS: dict[str, dict[str, Any]] = {
    "few_shot_baseline_tiny": {"dim": 8},
    "pfenet_tiny": {"dim": 8, "bins": [1.0, 0.5]},
    "bam_tiny": {"dim": 8, "base_classes": 3, "base_hidden": 8},
}


def network(name: str) -> tuple[Network, dict[str, Any]]:
    torch.manual_seed(0)
    config = {"name": name, "options": CONFIGS[name], "size": 65}
    return create_few_shot(config).eval(), config


def picture(seed: int, size: tuple[int, int] = (48, 64)) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def object_mask(size: tuple[int, int] = (48, 64)) -> np.ndarray[Any, np.dtype[np.uint8]]:
    mask = np.zeros(size, np.uint8)
    mask[8:40, 10:40] = 7
    return mask


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_gives_the_network_s_logits(name: str) -> None:
    net, config = network(name)
    model = set_support(net, [picture(1), picture(2)], [object_mask()] * 2, size=config["size"], name="cup")
    queries = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(0))
    samples = read_like([picture(1), picture(2)])
    images, masks = tensors([fit(sample, 65) for sample in samples])
    with torch.no_grad():
        expected = net(queries, images.expand(2, *images.shape), masks.expand(2, *masks.shape)).logits
        torch.testing.assert_close(model(queries).logits, expected)
    labels = Predictor(model)(picture(3)).labels
    assert labels.shape == (48, 64)
    assert model.classes.names == ("background", "cup")


def read_like(images: list[Any]) -> list[Any]:
    from segvit.contracts import Sample

    return [Sample(image, (object_mask() != 0).astype(np.uint8)) for image in images]


def test_unusable_supports() -> None:
    net, _ = network("few_shot_baseline_tiny")
    with pytest.raises(UserError, match="shows no object"):
        set_support(net, [picture(1)], [np.zeros((48, 64), np.uint8)], size=65)
    dot = np.zeros((480, 640), np.uint8)
    dot[3, 3] = 1
    with pytest.raises(UserError, match="1 pixels, too few"):
        set_support(net, [picture(1, (480, 640))], [dot], size=65)
    with pytest.raises(UserError, match="its mask"):
        set_support(net, [picture(1)], [object_mask((64, 48))], size=65)
    with pytest.raises(UserError, match="0 support images"):
        set_support(net, [], [], size=65)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for folder in ("queries", "support", "masks"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        Image.fromarray(picture(i)).save(tmp_path / f"support/{i}.png")
        Image.fromarray(object_mask()).save(tmp_path / f"masks/{i}.png")
    Image.fromarray(picture(5)).save(tmp_path / "queries/new.png")
    net, config = network("few_shot_baseline_tiny")
    save_few_shot(net, config, tmp_path / "run/model")
    return tmp_path


def predict(folder: Path, *more: str) -> None:
    arguments = ["--model", str(folder / "run"), "--support", str(folder / "support"), "--support_masks"]
    arguments += [str(folder / "masks"), "--out", str(folder / "out"), "--device", "cpu"]
    cli.main(["few_shot", "predict", str(folder / "queries"), *arguments, *more])


def test_masks_are_written(files: Path) -> None:
    predict(files, "--label", "7")
    found = np.asarray(Image.open(files / "out/new.png"))
    assert found.shape == (48, 64)
    assert set(np.unique(found)) <= {0, 1}


def test_an_image_that_is_a_support_is_left_out(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(picture(1)).save(files / "queries/copy.png")
    with pytest.raises(SystemExit):
        predict(files)
    assert "1 images were left out: support" in capsys.readouterr().err
    assert (files / "out/new.png").is_file()
    assert not (files / "out/copy.png").exists()


def test_support_files_that_do_not_fit(files: Path) -> None:
    assert [sample.mask.sum() for sample in read_supports(str(files / "support"), str(files / "masks"))] == [960, 960]
    (files / "masks/1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png has 0 masks"):
        read_supports(str(files / "support"), str(files / "masks"))
    Image.fromarray(object_mask((64, 48))).save(files / "masks/1.png")
    with pytest.raises(UserError, match="make them equal"):
        read_supports(str(files / "support"), str(files / "masks"))
