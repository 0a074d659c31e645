"""Self-training, learned words and masks of any source, on tiny models and generated images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from segvit import cli
from segvit.contracts import UserError
from segvit.data.dataset import open_dataset
from segvit.inference.predictor import Predictor
from segvit.model_folder import load_model, save_model
from segvit.tasks.dense import train
from segvit.tasks.pseudo_labels import pseudo_labels, write_pseudo_labels
from segvit.tasks.regions import FILL, name_masks, read_masks, write_crops
from segvit.text.architecture import MEAN, STD
from segvit.text.prompt import LearnedPrompt
from segvit.zoo import create_model
from tests.tasks.tiny import experiment

DATA = "synthetic:shapes?train=4&val=2&size=32"
SEEN = torch.tensor([True, True, False])
VISION = {"width": 64, "layers": 1, "heads": 2, "patch_size": 16, "image_size": 32}
ZSSEG: dict[str, Any] = {
    "backbone": "resnet18", "embed_dim": 16, "vision": VISION, "dim": 64, "mask_dim": 16, "queries": 6, "layers": 2,
    "heads": 2, "hidden": 32, "embed_hidden": 32, "region_size": 32, "dropout": 0.0,
}  # fmt: skip
PROMPTS: dict[str, Any] = {
    "embed_dim": 16, "vision": VISION, "text": {"width": 32, "layers": 1, "heads": 2}, "context": 3, "length": 0,
    "bottom_limit": 2, "general_steps": 0,
}  # fmt: skip


def zsseg_folder(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    classes = open_dataset(DATA).classes
    model = create_model("zsseg_resnet50", classes=classes, **(ZSSEG | options)).eval()
    save_model(model, folder)
    return model


def test_pseudo_labels_keep_what_is_known_and_reject_what_is_unsure() -> None:
    scores = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 3.0, 0.1]])[:, None]
    masks = torch.tensor([[255, 0, 1]])
    assert pseudo_labels(scores, masks, seen=SEEN, rejected=9).tolist() == [[2, 0, 1]]
    assert pseudo_labels(scores, None, seen=SEEN, rejected=9, least=0.5).tolist() == [[9, 2, 9]]
    with pytest.raises(UserError, match="every class is seen"):
        pseudo_labels(scores, masks, seen=torch.ones(3, dtype=torch.bool), rejected=9)


def test_a_folder_to_train_on(tmp_path: Path) -> None:
    """Seen labels stay, the rest is named by the model; then ordinary training runs on it."""
    model, data = zsseg_folder(tmp_path / "model", unseen=[1, 3]), open_dataset(DATA)
    found = write_pseudo_labels(str(tmp_path / "model"), DATA, str(tmp_path / "out"))
    made = open_dataset(tmp_path / "out" / "dataset.yaml")
    assert made.classes == data.classes
    assert (made.count("train"), made.count("val")) == (4, 2)
    segment, named = Predictor(model), []
    for i in range(4):
        before, after = data.read("train", i), made.read("train", i)
        assert np.array_equal(before.image, after.image)
        known = np.isin(before.mask, [k for k in range(len(data.classes)) if k not in (1, 3)])
        assert np.array_equal(after.mask[known], before.mask[known])
        scores = torch.cat([band for _, band in segment.bands(before.image)], dim=1)
        best = np.array([1, 3])[scores[[1, 3]].argmax(0).numpy()]
        assert np.array_equal(after.mask[~known], best[~known])
        named.append((~known).mean())
    assert found["named"] == pytest.approx(np.mean(named), abs=1e-4)
    assert np.array_equal(made.read("val", 0).mask, data.read("val", 0).mask)
    again = experiment(
        tmp_path / "run", batch_size=2, data=str(tmp_path / "out" / "dataset.yaml"), model="zsseg_resnet50",
        options=ZSSEG, steps=1, skip_check=True,
    )  # fmt: skip
    assert train(again).metrics is not None


def test_a_folder_of_files_is_linked_and_unsure_pixels_are_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zsseg_folder(tmp_path / "model")
    write_pseudo_labels(str(tmp_path / "model"), DATA, str(tmp_path / "first"), unseen=[2])
    source = str(tmp_path / "first" / "dataset.yaml")
    capsys.readouterr()
    cli.main(["clip", "pseudo_labels", str(tmp_path / "model"), "--data", source, "--unseen", "[2]", "--least", "0.999",
              "--out", str(tmp_path / "second"), "--json"])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["named"] == 0  # all were rejected
    first, second = open_dataset(source), open_dataset(tmp_path / "second")
    ignore = first.classes.ignore_index
    assert any((first.read("train", i).mask == 2).any() for i in range(4))
    for i in range(4):
        before, after = first.read("train", i), second.read("train", i)
        assert np.array_equal(after.mask, np.where(before.mask == 2, ignore, before.mask))
    (link,) = (tmp_path / "second" / "images").rglob(f"{Path(first.name('train', 0)).name}")
    assert link.read_bytes() == (tmp_path / "first" / first.name("train", 0)).read_bytes()


def test_what_pseudo_labels_cannot_do(tmp_path: Path) -> None:
    zsseg_folder(tmp_path / "model")

    def write(**options: Any) -> None:
        write_pseudo_labels(str(tmp_path / "model"), DATA, str(tmp_path / "out"), **options)

    with pytest.raises(UserError, match="every class is seen"):
        write()
    with pytest.raises(UserError, match="must be different ids"):
        write(unseen=[99])
    with pytest.raises(UserError, match="the model knows"):
        write_pseudo_labels(str(tmp_path / "model"), "synthetic:night?train=2&val=1&size=32", str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(UserError, match="not empty"):
        write()


def test_prompts_learned_on_crops_make_words_for_zsseg(tmp_path: Path) -> None:
    data = open_dataset(DATA)
    names = data.classes.names
    found = write_crops(DATA, str(tmp_path / "crops"), unseen=[1], least=9, per_class=4)
    files = list((tmp_path / "crops" / "train").glob("*/*.png"))
    assert found["train"] == len(files) > 3
    assert not (tmp_path / "crops" / "train" / names[1]).exists()
    cut = np.asarray(Image.open(sorted((tmp_path / "crops" / "train" / names[2]).iterdir())[0]))
    number = int(sorted((tmp_path / "crops" / "train" / names[2]).iterdir())[0].stem)
    sample = data.read("train", number)
    inside = sample.mask == 2
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    assert np.array_equal(cut[inside[box]], sample.image[box][inside[box]])
    assert (cut[~inside[box]] == FILL).all()
    assert np.allclose((FILL / 255 - MEAN) / STD, MEAN, atol=0.01)  # the mean, behind the normalisation

    options = [f"--options.{key}={json.dumps(value)}" for key, value in PROMPTS.items()]
    cli.main(["classify", "train", str(tmp_path / "crops"), "--model", "dpt_clip_vit_base", *options, "--size", "32",
              "--steps", "2", "--batch_size", "4", "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run"),
              "--json"])  # fmt: skip
    cli.main(
        ["clip", "words", str(tmp_path / "run"), "--classes", ",".join(names), "--out", str(tmp_path / "w.safetensors")]
    )
    vectors = load_file(tmp_path / "w.safetensors")["embeddings"]
    learned: Any = load_model(tmp_path / "run")
    prompt = LearnedPrompt(32, prefix=3)
    prompt.prefix.data = learned.text_prompts.context.detach()
    with torch.no_grad():
        torch.testing.assert_close(vectors, prompt(learned.text, names), rtol=1e-4, atol=1e-5)
    model = zsseg_folder(tmp_path / "model", vectors=str(tmp_path / "w.safetensors"))
    torch.testing.assert_close(model.class_embeddings, vectors)
    assert "vectors" not in model.config.options


def masks_of(image: Any) -> Tensor:
    masks = torch.zeros(3, 40, 50)
    masks[0, :20, :25], masks[1, 20:, 25:] = 1, 1  # the third one is empty
    return masks


def test_masks_of_any_source_are_named_by_clip(tmp_path: Path) -> None:
    model = zsseg_folder(tmp_path / "model")
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    masks = masks_of(image)
    scores = name_masks(model, image, masks)
    vectors, valid = model.regions(torch.from_numpy(image).movedim(2, 0) / 255, masks)
    assert valid.tolist() == [True, True, False]
    opinion = (100 * vectors @ model.region_embeddings.T).softmax(-1)
    torch.testing.assert_close(scores[:, 3, 4], opinion[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[:, 30, 40], opinion[1], rtol=1e-4, atol=1e-5)
    assert scores[:, 3, 40].abs().max() == 0

    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "a.png")
    ids = np.full((40, 50), 255, np.uint8)
    ids[:20, :25] = ids[20:, 25:] = 7
    Image.fromarray(ids).save(tmp_path / "masks" / "a.png")
    cli.main(["clip", "name", str(tmp_path / "images"), "--masks", str(tmp_path / "masks"), "--model",
              str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--components", "true"])  # fmt: skip
    labels = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert (labels[:20, :25] == int(opinion[0].argmax())).all()
    assert (labels[20:, 25:] == int(opinion[1].argmax())).all()
    assert (labels[:20, 25:] == 255).all()


def test_masks_in_files(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).random((2, 4, 5)).astype(np.float32)
    np.save(tmp_path / "a.npy", stack)
    assert np.array_equal(read_masks(tmp_path / "a.jpg", (4, 5), components=False).numpy(), stack)
    with pytest.raises(UserError, match="the image is"):
        read_masks(tmp_path / "a.jpg", (5, 4), components=False)
    with pytest.raises(UserError, match="no masks"):
        read_masks(tmp_path / "b.jpg", (4, 5), components=False)
    for name in ("c.npy", "d.png"):
        (tmp_path / name).write_bytes(b"junk")
        with pytest.raises(UserError, match="cannot be read"):
            read_masks(tmp_path / name, (4, 5), components=False)
    with pytest.raises(UserError, match="regions=False"):
        name_masks(zsseg_folder(tmp_path / "model", regions=False), np.zeros((4, 5, 3), np.uint8), torch.ones(1, 4, 5))
