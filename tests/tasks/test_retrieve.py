"""Retrieval: a run that resumes exactly over a frozen backbone, figures, the command line, one line for mistakes."""

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
from segvit.contracts import InputSpec, UserError
from segvit.data.image_folder import open_image_folder
from segvit.engine.settings import Schedule
from segvit.metrics.retrieval import recall_at_k
from segvit.model_folder import load_model
from segvit.tasks import retrieve
from segvit.tasks.classify import Classification, train_classifier
from segvit.tasks.dense import train
from segvit.tasks.labelled import Draws
from segvit.tasks.retrieve import Retrieval
from tests.tasks.tiny import experiment

TINY: dict[str, Any] = {"backbone": "test_resnet", "kernel": 5}
TRAIN, TEST = ("owl", "tit"), ("crow", "duck", "finch")


def write_birds(root: Path, *, count: int = 3, size: int = 40) -> Path:
    """Images of one colour for each class, with some noise."""
    rng = np.random.default_rng(0)
    for split, names in (("train", TRAIN), ("test", TEST)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            color = rng.integers(0, 200, 3)
            for i in range(count):
                pixels = color + rng.integers(0, 50, (size, size, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def retrieval(data: Path, out: Path, **changes: Any) -> Retrieval:
    base = Retrieval(
        data=str(data), out=str(out), model="frpt", options=TINY, weights="none", steps=4, batch_size=4, size=64,
        device="cpu", workers=0, schedule=Schedule(kind="cosine", warmup=1), checkpoint_every=2,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_birds(tmp_path_factory.mktemp("birds"))


@pytest.fixture(scope="module")
def trained(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("retrieve") / "run"
    return out, retrieve.train_retriever(retrieval(birds, out))


def test_a_run_leaves_what_it_should(trained: tuple[Path, dict[str, Any]]) -> None:
    out, found = trained
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["loss"] == pytest.approx(np.log(2), rel=0.3)
    assert json.loads((out / "val.json").read_text()) == found
    assert list(found) == ["recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "images", "classes", "split"]
    assert (found["images"], found["classes"], found["split"]) == (9, 3, "test")
    assert 0 <= found["recall_at_1"] <= found["recall_at_2"] <= found["recall_at_4"] <= found["recall_at_8"] == 1
    model = load_model(out)
    assert model.classes.names == TRAIN  # those of test are no part of the model
    assert model.spec.exact == (64, 64)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_a_resumed_run_ends_the_same(birds: Path, tmp_path: Path, monkeypatch: Any, form: str) -> None:
    options = TINY if form == "paper" else {"backbone": "test_resnet", "form": "released", "size": 64}
    whole, cut = (
        retrieval(birds, tmp_path / name, options=options, batch_size=2, jitter=0.2, erase=0.5)
        for name in ("whole", "cut")
    )
    retrieve.train_retriever(whole)
    loader = retrieve.batches

    def stopped(*arguments: Any) -> Any:
        for number, batch in enumerate(loader(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(retrieve, "batches", stopped)
    with pytest.raises(KeyboardInterrupt):
        retrieve.train_retriever(cut)
    monkeypatch.setattr(retrieve, "batches", loader)
    retrieve.train_retriever(replace(cut, resume=True))
    first, again = (load_model(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 4


def test_the_backbone_comes_from_another_run_and_stays(birds: Path, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.mkdir()
    (known / "train").symlink_to(birds / "train", target_is_directory=True)
    train_classifier(
        Classification(
            data=str(known), out=str(tmp_path / "base"), model="classifier", options={"backbone": "test_resnet"},
            steps=2, batch_size=4, size=64, device="cpu", workers=0,
        )
    )  # fmt: skip
    base = load_model(tmp_path / "base")
    retrieve.train_retriever(retrieval(birds, tmp_path / "run", weights=None, init=str(tmp_path / "base")))
    tuned = load_model(tmp_path / "run").backbone.state_dict()
    assert all(torch.equal(value, tuned[key]) for key, value in base.backbone.state_dict().items())

    data = open_image_folder(birds, own_classes=True)
    found = retrieve.retrieval_figures(retrieve.load_retriever(str(tmp_path / "base")), data, "test", ks=(1, 3))
    images = torch.stack([retrieve.Files([path], base.spec)[0] for path, _ in data.items("test")])
    with torch.no_grad():
        vectors = base.backbone(images).maps[-1].mean((2, 3)).numpy()
    expected = recall_at_k(vectors, np.array([label for _, label in data.items("test")]), ks=(1, 3))
    assert found["recall_at_1"] == expected[1]
    assert found["recall_at_3"] == expected[3]


def test_embeddings_have_length_one_and_name_what_is_missing(trained: tuple[Path, Any], tmp_path: Path) -> None:
    model = retrieve.load_retriever(str(trained[0]), device="cpu")
    paths = []
    for i, size in enumerate((20, 70, 33)):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (size, 50, 3), np.uint8)).save(paths[-1])
    paths[1].write_bytes(b"no image")
    found = retrieve.embed_files(model, paths)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-6)
    assert found.vectors.shape == (2, 96)
    assert found.kept == [0, 2]
    assert len(found.failed) == 1
    assert found.failed[0].startswith(str(paths[1]))
    alone = retrieve.embed_files(model, paths[2:])
    np.testing.assert_allclose(alone.vectors[0], found.vectors[1], atol=1e-5)
    with pytest.raises(UserError, match="none of 1 images can be read"):
        retrieve.embed_files(model, paths[1:2])


def test_an_embedding_without_a_direction_is_an_error(trained: tuple[Path, Any], birds: Path) -> None:
    model = retrieve.load_retriever(str(trained[0]), device="cpu")
    paths = sorted(birds.rglob("*.png"))
    with torch.no_grad():
        model.head[0].attention[0].weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"0\.png: its embedding has length nan \(15 like it\)"):
        retrieve.embed_files(model, paths)


def test_draws_are_jittered_and_erased_by_their_number(birds: Path) -> None:
    data, spec = open_image_folder(birds, own_classes=True), InputSpec(exact=(64, 64))
    plain = retrieval(birds, birds)
    looks = [Draws(data, run, spec)[5] for run in (plain, replace(plain, jitter=0.5), replace(plain, erase=1.0))]
    assert len({name for _, _, name in looks}) == 1
    assert not torch.equal(looks[0][0], looks[1][0])
    erased = (looks[2][0] == 0).all(0)
    assert 0.01 < erased.float().mean() < 0.4
    assert torch.equal(looks[0][0][:, ~erased], looks[2][0][:, ~erased])
    assert torch.equal(Draws(data, replace(plain, jitter=0.5), spec)[5][0], looks[1][0])


def test_the_command_line(trained: tuple[Path, Any], birds: Path, tmp_path: Path, capsys: Any) -> None:
    out, known = trained
    cli.main(["retrieve", "val", str(out), "--device", "cpu", "--workers", "0", "--json"])
    assert json.loads(capsys.readouterr().out) == known
    cli.main(["retrieve", "val", str(out), "--ks", "[1,3]", "--device", "cpu", "--workers", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["Recall@1", "Recall@3", "9"]
    assert lines[0].split()[1] == f"{100 * known['recall_at_1']:.2f}"
    cli.main(
        ["retrieve", "train", str(birds), "--out", str(tmp_path / "run"), "--model", "frpt", "--options",
         json.dumps(TINY), "--weights", "none", "--steps", "1", "--batch_size", "2", "--size", "64", "--optimizer",
         "sgd", "--prompt_lr", "0.01", "--crop", "[0.5,1.0]", "--workers", "0", "--device", "cpu"]
    )  # fmt: skip
    assert capsys.readouterr().out.startswith("Recall@1")
    stored = (tmp_path / "run" / "config.yaml").read_text()
    assert "name: sgd" in stored
    assert "prompt: 0.01" in stored
    assert load_model(tmp_path / "run").config.name == "frpt"


def test_mistakes(trained: tuple[Path, Any], birds: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a run; pass --resume"):
        retrieve.train_retriever(retrieval(birds, trained[0]))
    for changes, message in (
        ({"steps": 0}, "must be 1 or more"), ({"batch_size": 1}, "batch_size is 1"), ({"jitter": 2.0}, "jitter is 2.0"),
        ({"weights": None}, "the backbone never trains"), ({"init": "runs/x"}, "the backbone never trains"),
        ({"model": "classifier_resnet50"}, "classifier_resnet50 is not for retrieval"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            retrieval(birds, tmp_path, **changes)
    with pytest.raises(UserError, match="frpt_resnet50 is for retrieval; choose a classifier"):
        Classification(data="x", out="y", model="frpt_resnet50", steps=1)
    with pytest.raises(UserError, match="compares whole images and makes no masks; see segvit retrieve train"):
        train(experiment(tmp_path / "run", model="frpt_resnet50", options={}))
    data, model = open_image_folder(birds, own_classes=True), retrieve.load_retriever(str(trained[0]), device="cpu")
    with pytest.raises(UserError, match=r"Recall@K for K = \[9\], but there are 8 images to find"):
        retrieve.retrieval_figures(model, data, "test", ks=[9])


def test_mistakes_in_the_data(tmp_path: Path) -> None:
    data = write_birds(tmp_path / "birds", count=2)
    for message, spoil in (
        (r"test/crow: one image \(1 such classes\)", lambda: (data / "test/crow/1.png").unlink()),
        (r"test/crow: no images of this class", lambda: (data / "test/crow/0.png").unlink()),
        (r"0\.png: cannot be read as an image", lambda: (
            (data / "test/crow").rmdir(), (data / "train/owl/0.png").write_bytes(b"no image"))),
    ):  # fmt: skip
        spoil()
        with pytest.raises(UserError, match=message) as error:
            retrieve.train_retriever(retrieval(data, tmp_path / "run", overwrite=True))
        assert "\n" not in str(error.value)
    (data / "test/duck/0.png").write_bytes(b"no image")
    (data / "train/owl/0.png").unlink()
    with pytest.raises(UserError, match=r"test/duck/0\.png: cannot be read as an image"):
        retrieve.train_retriever(retrieval(data, tmp_path / "run", overwrite=True, steps=1))
    flat = tmp_path / "flat" / "train"
    flat.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(flat / "a.png")
    with pytest.raises(UserError, match="no folders in it; make one for each class"):
        retrieve.train_retriever(retrieval(flat.parent, tmp_path / "none"))
