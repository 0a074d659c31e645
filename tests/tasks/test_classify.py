"""Classification: a run that resumes exactly, with and without an adapter, figures, the command line; it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segvit import cli
from segvit.adapters.files import CONFIG
from segvit.contracts import Classes, Dense, InputSpec, UserError
from segvit.data.image_folder import open_image_folder
from segvit.engine.settings import Optim, Schedule
from segvit.model_folder import load_model
from segvit.tasks import classify
from segvit.tasks.adapters import merge_adapter
from segvit.tasks.classify import Classification
from segvit.tasks.dense import train
from segvit.tasks.labelled import Draws
from tests.tasks.tiny import experiment

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "drop_path": 0.1}
NAMES = ("bars", "disc", "dots", "edge", "plain", "waves")


def picture(kind: str, rng: np.random.Generator, side: int) -> Any:
    """An image of one class in a colour that says nothing of it."""
    rows, columns = np.mgrid[:side, :side] / side
    phase = rng.uniform(0, 6)
    shape = {
        "bars": np.sin(25 * columns + phase) > 0,
        "disc": np.hypot(rows - rng.uniform(0.4, 0.6), columns - rng.uniform(0.4, 0.6)) < 0.3,
        "dots": (np.sin(25 * columns + phase) > 0) & (np.sin(25 * rows + phase) > 0),
        "edge": rows + columns > rng.uniform(0.8, 1.2),
        "plain": np.ones_like(rows, bool),
        "waves": np.sin(25 * rows + phase) > 0,
    }[kind]
    colors = rng.uniform(0, 255, (2, 3))
    return np.where(shape[..., None], colors[0], 255 - colors[0]).astype(np.uint8)


def write_folder(root: Path, *, train: int, val: int, names: tuple[str, ...] = NAMES) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(picture(name, rng, 40)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"), train=3, val=2)


def run(data: Path, out: Path, **changes: Any) -> Classification:
    base = Classification(
        data=str(data), out=str(out), model="classifier_vit_tiny", options=TINY, steps=4, batch_size=4, size=32,
        device="cpu", workers=0, schedule=Schedule(kind="cosine", warmup=1), checkpoint_every=2,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("classify") / "run"
    return out, classify.train_classifier(run(folder, out))


def test_a_run_leaves_what_it_should(trained: tuple[Path, dict[str, Any]]) -> None:
    out, found = trained
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["loss"] == pytest.approx(np.log(6), rel=0.2)
    assert json.loads((out / "val.json").read_text()) == found
    assert found["images"] == 12
    assert found["top1"] <= found["top5"] <= 1
    assert found["top1"] == pytest.approx(np.mean(list(found["classes"].values())))
    model = load_model(out)
    assert model.classes.names == NAMES
    assert model.spec.exact == (32, 32)
    assert not (out / "adapter").exists()


@pytest.mark.parametrize("adapter", [None, "vpt_deep"])
def test_a_resumed_run_ends_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str | None
) -> None:
    whole, cut = (run(folder, tmp_path / name, adapter=adapter) for name in ("whole", "cut"))
    classify.train_classifier(whole)
    loader = classify.batches

    def stopped(*arguments: Any) -> Any:
        for number, batch in enumerate(loader(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(classify, "batches", stopped)
    with pytest.raises(KeyboardInterrupt):
        classify.train_classifier(cut)
    monkeypatch.setattr(classify, "batches", loader)
    classify.train_classifier(replace(cut, resume=True))
    first, again = (load_model(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("adapter", ["ssf", "spm"])
def test_adapters_start_from_another_run(trained: tuple[Path, Any], folder: Path, tmp_path: Path, adapter: str) -> None:
    base = load_model(trained[0])
    found = classify.train_classifier(run(folder, tmp_path / "run", init=str(trained[0]), adapter=adapter))
    assert json.loads((tmp_path / "run" / "adapter" / CONFIG).read_text())["base_model_name_or_path"] == str(trained[0])
    whole, apart = load_model(tmp_path / "run" / "model"), load_model(tmp_path / "run" / "adapter")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(whole(images).logits, apart(images).logits)
    whole.adapter.disable()
    torch.testing.assert_close(whole.backbone(images).pooled, base.backbone(images).pooled, rtol=0, atol=0)
    again = classify.accuracy(apart, open_image_folder(folder), "val")
    assert again == found
    if adapter == "ssf":
        merge_adapter(str(tmp_path / "run"), str(tmp_path / "plain"))
        plain = load_model(tmp_path / "plain")
        torch.testing.assert_close(plain(images).logits, apart(images).logits, rtol=1e-4, atol=1e-4)


def test_pictures_are_cut_square_and_mirrored(folder: Path) -> None:
    data = open_image_folder(folder)
    spec = InputSpec(exact=(32, 32))
    whole = run(folder, folder, crop=(1.0, 1.0), flip=0.0)
    for draw in range(3):
        plain, label, name = Draws(data, whole, spec)[draw]
        mirrored, same, again = Draws(data, replace(whole, flip=1.0), spec)[draw]
        assert (label, name) == (same, again)
        assert torch.equal(plain.flip(-1), mirrored)
        assert name.split("/")[1] == NAMES[label]
        part, _, _ = Draws(data, replace(whole, crop=(0.5, 0.5)), spec)[draw]
        assert part.shape == plain.shape == (3, 32, 32)
    seen = {Draws(data, whole, spec)[draw][2] for draw in range(18)}
    assert len(seen) == 18  # an epoch shows every image once


class Oracle(torch.nn.Module):
    """Puts the right class, which it reads from the first pixel, at a given place."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place, self.weight = place, torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> Any:
        right = images[:, 0, 0, 0].round().long()
        logits = torch.zeros(len(right), 6)
        for row, label in zip(logits, right.tolist(), strict=True):
            others = [i for i in range(6) if i != label]
            ranked = [*others[: self.place], label, *others[self.place :]]
            row[ranked] = torch.arange(6.0).flip(0)
        return Dense(logits[..., None, None], {}, (1, 1))


def test_top1_and_top5(tmp_path: Path) -> None:
    for label, name in enumerate(NAMES):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(label + 1):
            Image.fromarray(np.full((4, 4, 3), label, np.uint8)).save(tmp_path / "val" / name / f"{i}.png")
    data = open_image_folder(tmp_path)
    for place, (first, fifth) in {0: (1, 1), 4: (0, 1), 5: (0, 0)}.items():
        model: Any = Oracle(place)
        model.classes, model.spec = Classes(NAMES, ((0, 0, 0),) * 6), InputSpec(mean=(0,) * 3, std=(1 / 255,) * 3)
        found = classify.accuracy(model, data, "val")
        assert (found["top1"], found["top5"]) == (first, fifth)
        assert found["classes"] == dict.fromkeys(NAMES, first)
        assert found["images"] == 21


def test_the_command_line(
    trained: tuple[Path, dict[str, Any]], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, known = trained
    cli.main(["classify", "val", str(out), "--data", str(folder), "--device", "cpu", "--workers", "0", "--json"])
    assert json.loads(capsys.readouterr().out) == known
    target = tmp_path / "classes.json"
    cli.main(
        ["classify", "predict", str(folder / "val" / "disc"), "--model", str(out), "--top", "2", "--device", "cpu",
         "--out", str(target)]
    )  # fmt: skip
    rows = json.loads(target.read_text())
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png"]
    assert all(one["class"] in NAMES for row in rows for one in row["classes"])
    assert rows[0]["classes"][0]["score"] >= rows[0]["classes"][1]["score"]
    assert capsys.readouterr().out.count("\n") == 2
    cli.main(
        ["classify", "train", str(folder), "--out", str(tmp_path / "run"), "--model", "classifier_vit_tiny",
         "--options", json.dumps(TINY), "--adapter", "lora", "--adapter_options", '{"rank": 2}', "--steps", "1",
         "--batch_size", "2", "--size", "32", "--workers", "0", "--device", "cpu"]
    )  # fmt: skip
    assert capsys.readouterr().out.startswith("top1 ")
    assert load_model(tmp_path / "run").config.adapter == {"method": "lora", "options": {"rank": 2}}


def test_mistakes(trained: tuple[Path, Any], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a run; pass --resume"):
        classify.train_classifier(run(folder, trained[0]))
    with pytest.raises(UserError, match="segmenter_vit_tiny makes masks"):
        run(folder, tmp_path, model="segmenter_vit_tiny")
    with pytest.raises(UserError, match="classifies whole images"):
        train(experiment(tmp_path / "run", model="classifier_vit_tiny", options={}))
    with pytest.raises(UserError, match="crop is"):
        run(folder, tmp_path, crop=(0.5, 1.5))
    with pytest.raises(UserError, match="must be 1 or more"):
        run(folder, tmp_path, steps=0)
    with pytest.raises(UserError, match="belong to no adapter"):
        run(folder, tmp_path, adapter_options={"rank": 2})
    other = write_folder(tmp_path / "other", train=1, val=1, names=("disc", "dots"))
    with pytest.raises(UserError, match=r"the model knows \['bars'.* and the data has \['disc', 'dots'\]"):
        classify.accuracy(load_model(trained[0]), open_image_folder(other), "val")
    broken = other / "train" / "disc" / "0.png"
    broken.write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^\S+0\.png: cannot be read as an image") as error:
            classify.train_classifier(run(other, tmp_path / f"run{workers}", workers=workers))
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "images", train=40, val=10)
    options = TINY | {"drop_path": 0.0}
    whole = run(
        data, tmp_path / "run", options=options, steps=600, batch_size=16, checkpoint_every=600,
        optim=Optim(lr=1e-3, weight_decay=0.05, lr_mult={}, clip=5.0), schedule=Schedule(kind="cosine", warmup=20),
    )  # fmt: skip
    assert classify.train_classifier(whole)["top1"] > 0.7  # 0.17 by chance
