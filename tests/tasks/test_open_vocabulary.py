"""Words in use: class lists, what may change with them, backgrounds, freezing, and seen and unseen figures."""

from __future__ import annotations

import json
import shutil
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import segvit
from segvit.cli import main
from segvit.contracts import Classes, UserError
from segvit.metrics.confusion import ConfusionMatrix
from segvit.tasks import open_vocabulary
from segvit.tasks.open_vocabulary import find_unseen, freeze_run, seen_and_unseen, set_gap, unseen_classes
from segvit.text import tokenize
from segvit.text.architecture import describe_config
from segvit.text.checkpoint import find_clip
from segvit.text.class_list import background_words, read_classes
from segvit.text.embeddings import class_embeddings
from segvit.text.tower import text_tower
from tests.text.clips import clip_file

NAMES = ("cat", "dog", "traffic_light")
CLASSES = Classes(NAMES, ((9, 9, 9), (20, 20, 20), (40, 40, 40)))
ZEGCLIP: dict[str, Any] = {"image_size": 32, "heads": 2, "prompts": 3, "layers": 2, "unseen": [1]}
ZSSEG: dict[str, Any] = {
    "backbone": "resnet18", "dim": 64, "mask_dim": 16, "queries": 6, "layers": 2, "heads": 2, "hidden": 32,
    "embed_hidden": 32, "region_size": 32, "unseen": [1],
}  # fmt: skip
DENSECLIP: dict[str, Any] = {
    "image_size": 32, "drop_path": 0.0, "num_contexts": 4, "decoder_dim": 32, "decoder_layers": 1, "fpn_dim": 16,
    "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(clip_file(tmp_path_factory.mktemp("clip") / "clip.safetensors"))


def architecture(clip: str) -> dict[str, Any]:
    return describe_config(find_clip(None, clip).config)


@cache
def untouched(kind: str, clip: str) -> Any:
    return fresh(kind, clip, CLASSES)


def build(kind: str, clip: str, *, classes: Classes = CLASSES, **options: Any) -> Any:
    """A tiny model of the kind, in evaluation mode; always the same one."""
    return fresh(kind, clip, classes, **options) if options or classes != CLASSES else deepcopy(untouched(kind, clip))


def fresh(kind: str, clip: str, classes: Classes, **options: Any) -> Any:
    torch.manual_seed(0)
    if kind == "zegclip":
        model = segvit.create_model(
            "zegclip_vit_base", classes=classes,
            **({"backbone": architecture(clip), "weights": clip} | ZEGCLIP | options),
        )  # fmt: skip
    elif kind == "zsseg":
        model = segvit.create_model(
            "zsseg_resnet50", classes=classes,
            **({"clip": architecture(clip), "text_weights": clip} | ZSSEG | options),
        )  # fmt: skip
    else:
        model = segvit.create_model(
            "denseclip_vit_base", classes=classes, **({"clip": architecture(clip)} | DENSECLIP | options)
        )
    return model.eval()


def picture(height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def run(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(1, 3, 32, 48))


# Class lists


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rust", [["rust"]]),
        ("rust, bolt,  cable   tray", [["rust"], ["bolt"], ["cable tray"]]),
        ("rust: corrosion, oxide; bolt; tray:", [["rust", "corrosion", "oxide"], ["bolt"], ["tray"]]),
        ("rust: corrosion, oxide", [["rust", "corrosion", "oxide"]]),
        ("rust; bolt", [["rust"], ["bolt"]]),
    ],
)
def test_class_lists_in_one_line(text: str, expected: list[list[str]]) -> None:
    assert read_classes(text) == expected


def test_class_files(tmp_path: Path) -> None:
    file = tmp_path / "classes"
    file.write_text("# parts\nrust: corrosion, oxide\n\n  cable tray \n", encoding="utf-8-sig")
    assert read_classes(str(file)) == [["rust", "corrosion", "oxide"], ["cable tray"]]
    file.write_text("# nothing yet\n")
    with pytest.raises(UserError, match="list of classes is empty"):
        read_classes(str(file))
    file.write_bytes(b"\xff\xfe\x00rust")
    with pytest.raises(UserError, match="save it as UTF-8"):
        read_classes(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list of classes is empty"),
        ("   ", "list of classes is empty"),
        ("classes.txt", "no such class file"),
        ("lists/mine", "no such class file"),
        ("/nowhere/classes", "no such class file"),
        ("rust, oxide; bolt", "commas but no colon"),
    ],
)
def test_class_lists_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_classes(text)
    assert "\n" not in str(error.value)


def test_a_very_long_list_is_no_file_name() -> None:
    assert len(read_classes(", ".join(f"thing {number}" for number in range(900)))) == 900


# Other classes


@pytest.mark.parametrize("kind", ["zegclip", "zsseg"])
def test_other_words_are_vectors_of_the_text_tower(kind: str, clip: str, tmp_path: Path) -> None:
    model = build(kind, clip)
    before = run(model).logits
    segvit.set_classes(model, "rust: corrosion; Traffic Light; dog; cat: kitten")
    tower = text_tower(None, weights=clip)
    template = "a photo of a {}" if kind == "zegclip" else "a sculpture of a {}."
    words = [["rust", "corrosion"], "Traffic Light", "dog", ["cat", "kitten"]]
    expected = class_embeddings(tower, words, templates=template, cache=False)
    torch.testing.assert_close(model.class_embeddings, expected)
    assert model.seen.tolist() == [False, True, False, True]  # what training knew by one of its words
    assert model.classes.names == ("rust", "Traffic Light", "dog", "cat")
    assert len(set(model.classes.palette)) == 4
    segvit.save(model, tmp_path)
    again = segvit.load(tmp_path)
    assert again.classes == model.classes
    assert torch.equal(run(again).logits, run(model).logits)
    # Back to the first ones, which the list in between did not hold all of.
    segvit.set_classes(again, list(NAMES))
    torch.testing.assert_close(run(again).logits, before, atol=1e-5, rtol=1e-4)
    assert again.seen.tolist() == [True, False, True]
    assert again.classes.names == NAMES


def test_a_class_more_changes_no_mask_of_zegclip(clip: str) -> None:
    model = build("zegclip", clip)
    before = run(model)
    segvit.set_classes(model, [*NAMES, "rust"])
    after = run(model)
    torch.testing.assert_close(after.extras["masks"][:, :3], before.extras["masks"])
    torch.testing.assert_close(after.logits[:, :3], before.logits)  # the gap included
    assert after.extras["bias"].tolist() == [[pytest.approx(0.1), 0.0, pytest.approx(0.1), 0.0]]


def test_a_class_more_changes_no_proposal_and_no_cosine_of_zsseg(clip: str) -> None:
    model = build("zsseg", clip)
    before = run(model)
    segvit.set_classes(model, [*NAMES, "rust"])
    after = run(model)
    assert torch.equal(after.extras["masks"], before.extras["masks"])
    torch.testing.assert_close(after.extras["class_logits"][..., [0, 1, 2, 4]], before.extras["class_logits"])
    torch.testing.assert_close(model.region_embeddings, model.class_embeddings)


def test_denseclip_takes_other_words_for_its_own_classes(clip: str, tmp_path: Path) -> None:
    model, words = build("denseclip", clip), ["kitten", "big brown hound", "signal"]
    before = run(model)
    segvit.set_classes(model, words)
    expected = build("denseclip", clip, classes=Classes(tuple(words), CLASSES.palette))
    expected.load_state_dict(model.state_dict())
    assert torch.equal(run(model).logits, run(expected).logits)
    assert not torch.equal(run(model).extras["score_map"], before.extras["score_map"])
    segvit.save(model, tmp_path)
    assert torch.equal(run(segvit.load(tmp_path)).logits, run(expected).logits)
    for wrong in (["kitten"], [["cat", "kitten"], "dog", "signal"]):
        with pytest.raises(UserError, match="for the 3 classes that it was trained on"):
            segvit.set_classes(model, wrong)
    with pytest.raises(UserError, match="word pieces"):
        segvit.set_classes(model, ["cat", "dog", "light " * 80])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "list of classes is empty"),
        (["rust", " "], "class 1 has an empty name"),
        (["rust", "bolt", " Rust "], "names two classes, 0 and 2"),
        (["cable tray", ["bolt", "cable_tray"]], "names two classes, 0 and 1"),
        (["rust " * 80], "word pieces, but 75 is the most"),
    ],
)
@pytest.mark.parametrize("kind", ["zegclip", "zsseg"])
def test_wrong_lists_are_refused_and_change_nothing(kind: str, classes: list[Any], message: str, clip: str) -> None:
    model = build(kind, clip)
    before = model.class_embeddings.clone(), model.config
    with pytest.raises(UserError, match=message):
        segvit.set_classes(model, classes)
    assert torch.equal(model.class_embeddings, before[0])
    assert model.config == before[1]


def test_models_that_know_no_words(clip: str, tmp_path: Path) -> None:
    plain = segvit.create_model("segvit_vit_tiny", num_classes=3, image_size=32, depth=3, out_indices=[0, 1, 2])
    for change in (lambda: segvit.set_classes(plain, ["rust"]), lambda: segvit.freeze_classes(plain)):
        with pytest.raises(UserError, match="segvit_vit_tiny knows no words"):
            change()
    model = build("zegclip", clip, weights=None)
    with pytest.raises(UserError, match="without CLIP's weights, so it knows no words"):
        segvit.set_classes(model, ["rust"])
    with pytest.raises(UserError, match="does not make the vectors of the model's own classes"):
        segvit.set_classes(model, ["rust"], text_weights=clip)  # its own are random
    model = build("zsseg", clip)
    model.set_classes(model.class_embeddings, unseen=[1], regions=model.class_embeddings.flip(0))
    with pytest.raises(UserError, match="without learned prompts"):
        segvit.set_classes(model, ["rust"])
    moved = shutil.copy(clip, tmp_path / "here.safetensors")
    model = build("zegclip", clip, weights=str(moved))
    Path(moved).rename(tmp_path / "there.safetensors")
    with pytest.raises(UserError, match=r"was in .*here\.safetensors; give text_weights"):
        segvit.set_classes(model, ["rust"])
    segvit.set_classes(model, ["rust"], text_weights=str(tmp_path / "there.safetensors"))
    assert model.config.words["weights"] == str((tmp_path / "there.safetensors").resolve())


# Background


@pytest.mark.parametrize("kind", ["zegclip", "zsseg", "denseclip"])
def test_pixels_below_the_threshold_are_background(kind: str, clip: str) -> None:
    model, image = build(kind, clip), picture()
    labels, values = segvit.Predictor(model).segment(image, scores=True)
    assert values is not None
    best = torch.from_numpy(values.astype(np.float32))
    if kind == "zegclip":
        best = best + 0.1 * model.seen[:, None, None]  # as it is before the gap
    elif kind == "denseclip":
        best = best.softmax(0)
    chosen = best.numpy()[labels, np.arange(40)[:, None], np.arange(56)]
    middle = float(np.median(chosen))
    clear = np.abs(chosen - middle) > 2e-3  # scores are kept as float16
    segvit.set_classes(model, background="threshold", threshold=middle)
    result = segvit.Predictor(model)(image, scores=True)
    assert result.classes.names == (*NAMES, "background")
    assert result.classes.palette[-1] not in CLASSES.palette
    assert result.scores is not None
    assert result.scores.shape == (4, 40, 56)
    np.testing.assert_array_equal(result.labels[clear], np.where(chosen < middle, 3, labels)[clear])
    assert 0.2 < (result.labels == 3).mean() < 0.8
    result.overlay()
    segvit.set_classes(model)
    assert model.classes == CLASSES
    np.testing.assert_array_equal(segvit.Predictor(model)(image).labels, labels)


def test_background_words_compete_as_a_class_more(clip: str) -> None:
    model = build("zegclip", clip)
    segvit.set_classes(model, ["rust", "sky"], background="words")
    words = background_words([["rust"], ["sky"]])
    assert "sky" not in words
    assert words[:2] == ["background", "wall"]
    assert model.classes.names == ("rust", "sky", "background")
    tower = text_tower(None, weights=clip)
    expected = class_embeddings(tower, [words], templates="a photo of a {}", cache=False)
    torch.testing.assert_close(model.class_embeddings[2:], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "threshold"}, "give a threshold"),
        ({"threshold": 0.5}, "has no effect with background none"),
        ({"background": "words", "threshold": 0.5}, "has no effect with background words"),
        ({"background": "threshold", "threshold": 1.0}, "between 0 and 1"),
        ({"background": "threshold", "threshold": 0.5, "classes": ["Background"]}, "named background already"),
        ({"background": "words", "classes": "rust; rest: background"}, "named background already"),
    ],
)
def test_background_rules_that_contradict(options: dict[str, Any], message: str, clip: str) -> None:
    with pytest.raises(UserError, match=message):
        segvit.set_classes(build("zegclip", clip), **options)


# Freezing


@pytest.mark.parametrize("kind", ["zegclip", "zsseg", "denseclip"])
def test_frozen_models_need_neither_text_tower_nor_open_clip(
    kind: str, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind, clip)
    expected, seen = run(model).logits, unseen_classes(model)
    segvit.freeze_classes(model)
    torch.testing.assert_close(run(model).logits, expected)
    assert not [key for key in model.state_dict() if "token_embedding" in key]
    segvit.save(model, tmp_path)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setattr(tokenize, "_tokenizer", lambda: pytest.fail("names are read"))
    again = segvit.load(tmp_path)
    assert again.classes == CLASSES
    assert unseen_classes(again) == seen
    torch.testing.assert_close(run(again).logits, expected)
    with pytest.raises(UserError, match="frozen, it knows no words"):
        segvit.set_classes(again, ["a", "b", "c"])
    segvit.set_classes(again, background="threshold", threshold=0.5)  # a way of reading, not a word
    assert again.classes.names == (*NAMES, "background")
    segvit.set_classes(again)
    segvit.freeze_classes(again)  # once more changes nothing
    torch.testing.assert_close(run(again).logits, expected)


def test_what_cannot_be_frozen(clip: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompting post"):
        segvit.freeze_classes(build("denseclip", clip, prompting="pre"))
    model = build("zegclip", clip)
    segvit.save(model, tmp_path / "model")
    segvit.set_classes(model, background="threshold", threshold=0.5)
    with pytest.raises(UserError, match="freeze without it"):
        segvit.freeze_classes(model)
    with pytest.raises(UserError, match="is not empty"):
        freeze_run(str(tmp_path / "model"), str(tmp_path / "model"), open_vocabulary.Vocabulary())


def test_an_architecture_that_is_none(clip: str) -> None:
    for wrong in ({}, {"vision": None}, {"vision": {"size": 3}, "text": None}, {"vision": 3, "text": None}):
        with pytest.raises(UserError, match="is no architecture of CLIP"):
            build("zegclip", clip, backbone=wrong, weights=None)


# What the words say

COLORS = {"rust": (200, 30, 30), "bolt": (40, 190, 50), "cable tray": (30, 40, 210), "sky": (180, 180, 190)}


@pytest.fixture(scope="module")
def reader(clip: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ZegCLIP set by hand to see the meaning of each cell's colour, in a folder; its own classes are others."""
    model = build("zegclip", clip, layers=1, unseen=())
    vit, head, seen = model.backbone, model.head, list[torch.Tensor]()
    projection = dict(vit.embedding.named_modules())["joint.proj"]
    vectors = class_embeddings(text_tower(None, weights=clip), list(COLORS), templates="a photo of a {}", cache=False)
    with torch.no_grad():
        for block in vit.blocks:  # every token keeps what it has
            for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
                linear.weight.zero_()
                linear.bias.zero_()
        vit.pos_embed.zero_()
        hook = projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, -16:].mean(1)))
        mean, std = (torch.tensor(values)[:, None, None] for values in (model.spec.mean, model.spec.std))
        for color in COLORS.values():
            model((torch.tensor(color)[:, None, None].expand(3, 32, 32) / 255 - mean)[None] / std)
        hook.remove()
        projection.weight.copy_(torch.linalg.lstsq(torch.cat(seen), vectors).solution.mT)
        width = vectors.shape[1]
        head.relate.weight.copy_(torch.cat([torch.zeros(width, width), torch.eye(width)], dim=1))
        head.q.weight.copy_(5 / head.scale * torch.eye(width))
        head.k.weight.copy_(torch.eye(width))
        for linear in (head.relate, head.q, head.k):
            linear.bias.zero_()
    folder = tmp_path_factory.mktemp("reader") / "model"
    segvit.save(model, folder)
    return folder


def quarters(path: Path) -> np.ndarray:
    """A picture with a colour in each quarter; the number of each pixel's colour."""
    ids = np.kron(np.array([[0, 1], [2, 3]]), np.ones((16, 24), int))
    Image.fromarray(np.array(list(COLORS.values()), np.uint8)[ids]).save(path)
    return ids


def assert_painted(found: np.ndarray, expected: np.ndarray, *, among: int = 4) -> None:
    """Equal where one of so many is expected, but within half a cell of where colours meet: that is interpolated."""
    apart = expected < among
    for axis in (0, 1):
        for step in range(-4, 5):
            apart &= np.roll(expected, step, axis) == expected
    assert apart.mean() > 0.08 * among
    np.testing.assert_array_equal(found[apart], expected[apart])


def test_predict_paints_what_the_words_say(reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = quarters(tmp_path / "photo.bmp")

    def painted(*options: str) -> np.ndarray:
        main(["predict", str(tmp_path / "photo.bmp"), "--model", str(reader), "--out", str(tmp_path), *options])
        found = Image.open(capsys.readouterr().out.strip())
        assert found.mode == "P"
        return np.asarray(found)

    assert_painted(painted("--classes", ", ".join(COLORS)), ids)
    assert_painted(painted("--classes", "sky, cable tray, bolt, rust", "--areas"), 3 - ids)
    areas = json.loads((tmp_path / "photo.json").read_text())
    assert {row["name"]: row["fraction"] for row in areas["classes"]} == dict.fromkeys(
        COLORS, pytest.approx(0.25, abs=0.03)
    )
    without = painted("--classes", "rust, bolt, cable tray", "--scores")
    assert_painted(without, ids, among=3)
    assert np.load(tmp_path / "photo_scores.npz")["scores"].shape == (3, 32, 48)
    (tmp_path / "classes.txt").write_text("rust\nbolt\ncable tray\n")
    other = painted("--classes", str(tmp_path / "classes.txt"), "--background", "words", "--overlay")
    assert_painted(other, ids, among=3)
    assert (tmp_path / "photo_overlay.png").is_file()
    threshold = str(1 / (1 + np.exp(-4.99)))  # a match is 5; whatever is no word's own colour is below
    least = painted("--classes", "rust, bolt", "--background", "threshold", "--threshold", threshold)
    assert_painted(least, np.minimum(ids, 2))


def test_freeze_at_the_command_line(reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = quarters(tmp_path / "photo.bmp")
    out = tmp_path / "closed"
    main(["models", "freeze", str(reader), "--out", str(out), "--classes", ", ".join(COLORS)])
    assert capsys.readouterr().out.strip() == str(out)
    closed = segvit.load(out)
    assert closed.classes.names == tuple(COLORS)
    assert_painted(segvit.Predictor(closed)(tmp_path / "photo.bmp").labels, ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", ""], "list of classes is empty"),
        (["--classes", "rust, Rust"], "names two classes"),
        (["--classes", "nowhere.txt"], "no such class file"),
        (["--classes", "rust", "--threshold", "0.5"], "set background threshold"),
        (["--background", "threshold"], "give a threshold"),
        (["--text-weights", "openai"], "give --classes too"),
        (["--gap", "1.5"], "from 0 to 1"),
    ],
)
def test_errors_are_one_line(
    options: list[str], message: str, reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quarters(tmp_path / "photo.bmp")
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(tmp_path / "photo.bmp"), "--model", str(reader), "--out", str(tmp_path / "out"), *options])
    printed = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert message in printed.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# Seen and unseen


def test_figures_of_a_matrix_made_by_hand() -> None:
    counts = ConfusionMatrix(3, 255)
    counts.matrix[:] = [[6, 2, 0], [2, 4, 2], [0, 0, 4]]  # IoU 6/10, 4/10, 4/6
    record, text = seen_and_unseen(counts.metrics(), [2], CLASSES)
    assert record["seen"] == pytest.approx(0.5)
    assert record["unseen"] == pytest.approx(2 / 3)
    assert record["harmonic"] == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert record["aacc"] == pytest.approx(14 / 20)
    assert record["unseen_classes"] == ["traffic_light"]
    assert text == "seen 0.5000  unseen 0.6667  hIoU 0.5714  pAcc 0.7000  (1 of 3 classes unseen)"


def test_who_is_unseen(clip: str) -> None:
    runs = segvit.Predictor(build("zegclip", clip)).run
    assert find_unseen(None, runs, CLASSES) == [1]
    assert find_unseen("traffic light, Cat", runs, CLASSES) == [0, 2]
    with pytest.raises(UserError, match="'horse' is neither a class of the data nor a split"):
        find_unseen("cat, horse", runs, CLASSES)
    with pytest.raises(UserError, match="split voc12 hides"):
        find_unseen("voc12", runs, CLASSES)
    voc = Classes(
        tuple("abcdefghijklmno") + ("potted plant", "sheep", "sofa", "train", "tv_monitor"), ((0, 0, 0),) * 20
    )
    assert find_unseen("voc12", runs, voc) == [15, 16, 17, 18, 19]


def test_the_gap_is_zegclips_own(clip: str, tmp_path: Path) -> None:
    model = build("zegclip", clip)
    set_gap(model, 0.25)
    segvit.save(model, tmp_path)
    assert run(segvit.load(tmp_path)).extras["bias"].tolist() == [[0.25, 0.0, 0.25]]
    with pytest.raises(UserError, match="takes no gap"):
        set_gap(build("zsseg", clip), 0.1)
    with pytest.raises(UserError, match="from 0 to 1"):
        set_gap(model, -0.1)


def test_training_without_some_classes_then_self_training_and_evaluation(
    clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inductive from CLIP's weights, transductive from there, and what val says; the labels stay whole throughout."""
    options = {
        "backbone": architecture(clip),
        "image_size": 32,
        "heads": 2,
        "prompts": 2,
        "layers": 1,
        "unseen": [2, 5],
    }
    common = [
        "--data", "synthetic:shapes?train=8&val=4&size=32", "--model", "zegclip_vit_base", "--weights", clip,
        "--batch_size", "4", "--augment.crop", "[32,32]", "--schedule.warmup", "0", "--workers", "0",
        "--optim.lr", "0.001", "--device", "cpu",
    ]  # fmt: skip
    first, second = str(tmp_path / "inductive"), str(tmp_path / "transductive")
    main(["train", *common, "--out", first, "--steps", "3", "--options", json.dumps(options)])
    main([
        "train", *common, "--out", second, "--steps", "2", "--options", json.dumps(options | {"seen_bias": 0.0}),
        "--init", first, "--loss", '{"setting": "transductive"}',
    ])  # fmt: skip
    capsys.readouterr()
    assert unseen_classes(segvit.load(second)) == [2, 5]
    assert json.loads((tmp_path / "inductive" / "val.json").read_text())["open_vocabulary"]["harmonic"] >= 0
    main(["val", second, "--workers", "0"])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "transductive" / "evaluation" / "val" / "metrics.json").read_text())
    found = record["open_vocabulary"]
    groups = [[row["iou"] for row in record["classes"] if (row["id"] in (2, 5)) == hidden] for hidden in (False, True)]
    seen, unseen = (np.mean([iou for iou in group if iou is not None]) for group in groups)
    assert (found["seen"], found["unseen"]) == (pytest.approx(seen), pytest.approx(unseen))
    assert f"hIoU {found['harmonic']:.4f}" in printed
    assert "(2 of 8 classes unseen)" in printed
    names = segvit.load(second).classes.names
    main(["val", first, "--workers", "0", "--json", "--gap", "1", "--classes", "data", "--unseen", names[3]])
    report = json.loads(capsys.readouterr().out)
    assert report["open_vocabulary"]["unseen_classes"] == [names[3]]
    # With a gap of 1 no seen class can win against the hidden ones, which the other list did not change.
    confusion = np.array(report["confusion"])
    assert confusion[:, [2, 5]].sum() == confusion.sum()
