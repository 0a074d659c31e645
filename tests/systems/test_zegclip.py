"""ZegCLIP beyond the golden cases: prompts by depth, hidden classes, self-training, calibration, words, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.backbones.vit import PlainViT
from segvit.contracts import Classes, Dense, UserError
from segvit.model_folder import load_model, match_classes, save_model
from segvit.nn.tokens import Step
from segvit.systems import zegclip
from segvit.text.embeddings import class_embeddings
from segvit.text.tower import text_tower
from segvit.zoo import build_network, create_model
from tests.counting import gmacs
from tests.text.clips import clip_file, openai_state, tiny_clip

NAMES = ("cat", "dog", "train", "sofa", "tree")
CLASSES = Classes(NAMES, tuple((i, 2 * i, 9) for i in range(5)))
TINY: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 64, "joint_dim": 16, "heads": 2, "prompts": 3,
    "layers": 2,
}  # fmt: skip


def tiny(**options: Any) -> Any:
    torch.manual_seed(0)
    return create_model("zegclip_vit_base", classes=CLASSES, **(TINY | options)).eval()


def steps(vit: PlainViT, images: Tensor) -> list[Step]:
    found = [vit.embed(images)]
    for index in range(len(vit.blocks)):
        found.append(vit.run(index, found[-1]))
    return found


@pytest.mark.parametrize(("deep", "prefixes"), [(3, [1, 4, 4, 4, 4]), (1, [1, 4, 4, 1, 1]), (0, [1, 4, 4, 4, 4])])
def test_prompts_by_depth(deep: int, prefixes: list[int]) -> None:
    """The official loop written out; prompts are replaced, later removed, or (shallow) stay."""
    vit, images = tiny(prompt_layers=deep, dropout=0.0).backbone, torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        assert [step.prefix for step in steps(vit, images)] == prefixes
        prompts, tokens, patches = vit.gaps["0"], vit.embed(images).tokens, 3 * 5
        for index, block in enumerate(vit.blocks):
            if index == 0:
                own = prompts.prompt_proj(prompts.prompt_embeddings).expand(2, -1, -1)
            elif 1 <= index <= deep:
                own = prompts.prompt_proj(prompts.deep_prompt_embeddings[index - 1]).expand(2, -1, -1)
            elif deep == 0:
                own = tokens[:, 1:-patches]
            else:
                own = tokens[:, :0]
            tokens = block(torch.cat([tokens[:, :1], own, tokens[:, -patches:]], dim=1))
        joint = vit.embedding.joint(vit.embedding.prompt_norm(tokens))
        features = vit(images)
        torch.testing.assert_close(features.pooled, joint[:, 0])
        torch.testing.assert_close(features.extras["dense"].flatten(2).mT, joint[:, -patches:])
    assert isinstance(vit.embedding.prompt_norm, torch.nn.LayerNorm) == bool(deep)


def test_only_prompts_and_head_train() -> None:
    trained = {name for name, parameter in tiny().named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "prompt" not in name} == {n for n in trained if n.startswith("head.")}
    assert sum("prompt" in name for name in trained) == 6


def output(*, unseen: tuple[int, ...], seen_bias: float = 0.1) -> Dense:
    torch.manual_seed(3)
    seen = torch.tensor([number not in unseen for number in range(5)])
    masks = torch.randn(2, 5, 4, 4, dtype=torch.float64).requires_grad_()
    return zegclip.dense_output(masks, seen, seen_bias=seen_bias, covers=(32, 32))


def labels() -> Tensor:
    torch.manual_seed(4)
    masks = torch.randint(0, 5, (2, 30, 31)).to(torch.uint8)
    masks[0, :9] = 255
    return masks


def terms(out: Dense, masks: Tensor, *, totals_of: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    totals = zegclip.normalisers(masks if totals_of is None else totals_of, num_classes=5, ignore_index=255)
    return zegclip.criterion(out, masks, totals, ignore_index=255, **options)


def by_hand(logits: Tensor, masks: Tensor, columns: list[int]) -> tuple[Tensor, Tensor]:
    """Focal loss of all maps and dice of those present, over the number of present ones, in plain tensors."""
    full = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)[..., :30, :31]
    focal, dice, pairs = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for image, wanted in zip(full, masks, strict=True):
        for column in columns:
            target, p = (wanted == column).double(), image[column].sigmoid()
            right = p * target + (1 - p) * (1 - target)
            alpha = 0.25 * target + 0.75 * (1 - target)
            focal = focal + (-alpha * (1 - right) ** 2 * right.log()).mean()
            if target.any():
                pairs += 1
                dice = dice + 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    return 100 * focal / max(1, pairs), dice / max(1, pairs)


def test_unseen_classes_are_hidden_from_the_loss() -> None:
    out, masks = output(unseen=(2, 4)), labels()
    got = terms(out, masks)
    hidden = masks.masked_fill((masks == 2) | (masks == 4), 255)
    expected = by_hand(out.extras["masks"], hidden, [0, 1, 3])
    torch.testing.assert_close((got["loss_focal"], got["loss_dice"]), expected)
    assert terms(out, hidden) == got  # labels hidden beforehand, as a data set may have them
    swapped = torch.where(masks == 2, 4, torch.where(masks == 4, 2, masks.int())).to(torch.uint8)
    assert terms(out, swapped) == got
    gradient = torch.autograd.grad(got["loss_focal"] + got["loss_dice"], out.extras["masks"])[0]
    assert (gradient[:, [2, 4]] == 0).all()
    assert (gradient[:, [0, 1, 3]] != 0).any()


def test_self_training_labels_unseen_pixels_by_the_best_unseen_mask() -> None:
    out, masks = output(unseen=(2, 4)), labels()
    full = F.interpolate(out.extras["masks"], size=(32, 32), mode="bilinear", align_corners=False)[..., :30, :31]
    guess = torch.where(full[:, 2] >= full[:, 4], 2, 4)
    expected = torch.where((masks == 2) | (masks == 4), guess, masks.long())
    made = zegclip.training_labels(out, masks, ignore_index=255, self_training=True)
    assert torch.equal(made.long(), expected)
    got = terms(out, masks, setting="transductive")
    torch.testing.assert_close(
        (got["loss_focal"], got["loss_dice"]), by_hand(out.extras["masks"], expected, list(range(5)))
    )
    with pytest.raises(UserError, match="needs unseen classes to guess"):
        terms(output(unseen=()), masks, setting="transductive")


def test_a_guess_of_a_class_that_no_pixel_has_counts_as_present() -> None:
    out, masks = output(unseen=(2, 4)), labels()
    masks[masks == 4] = 2  # one unseen class is labelled, two are guessed
    got = terms(out, masks, setting="transductive")
    made = zegclip.training_labels(out, masks, ignore_index=255, self_training=True)
    assert (made == 4).any()
    torch.testing.assert_close(
        (got["loss_focal"], got["loss_dice"]), by_hand(out.extras["masks"], made, list(range(5)))
    )


def test_class_weights_multiply_the_masks_of_a_class() -> None:
    out, masks = output(unseen=()), labels()
    plain = terms(out, masks)
    parts = [terms(out, masks, class_weights=torch.eye(5)[number]) for number in range(5)]
    for key, value in plain.items():
        torch.testing.assert_close(torch.stack([part[key] for part in parts]).sum(), value)
        assert parts[0][key] > 0


def test_calibration_acts_on_seen_classes_only() -> None:
    out, plain = output(unseen=(2, 4)), output(unseen=(2, 4), seen_bias=0.0)
    difference = zegclip.READOUT(plain, (30, 31), range(30)) - zegclip.READOUT(out, (30, 31), range(30))
    wanted = torch.tensor([0.1, 0.1, 0.0, 0.1, 0.0], dtype=torch.float64)
    torch.testing.assert_close(difference, wanted[:, None, None].expand_as(difference))
    torch.testing.assert_close((plain.logits - out.logits).mean((0, 2, 3)), wanted)


def test_classes_do_not_see_each_other() -> None:
    model, images = tiny(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(images).extras["masks"]
        words = F.normalize(torch.randn(2, 16), dim=-1)
        model.set_classes(torch.cat([model.class_embeddings[[3, 0]], words]), unseen=(2, 3))
        out = model(images)
    torch.testing.assert_close(out.extras["masks"][:, :2], before[:, [3, 0]])
    assert out.extras["seen"].tolist() == [[True, True, False, False]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(clip_file(tmp_path_factory.mktemp("clip") / "clip.safetensors"))


def real(clip: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """A model on a CLIP of open_clip whose architecture is read off its file in the place of that of a name."""
    from segvit.text.checkpoint import find_clip

    found = find_clip(None, clip)
    monkeypatch.setattr(zegclip, "clip_config", lambda name: found.config)

    def find(name: str, weights: str | None) -> Any:
        return find_clip(None, weights) if weights else type(found)(found.config, None, name)

    monkeypatch.setattr(zegclip, "find_clip", find)
    options = {"image_size": 32, "heads": 2, "prompts": 3} | options
    return create_model("zegclip_vit_base", classes=CLASSES, **options).eval()


def test_words_of_the_text_tower(clip: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = real(clip, monkeypatch, weights=clip)
    expected = class_embeddings(text_tower(None, weights=clip), NAMES, templates="a photo of a {}", cache=False)
    torch.testing.assert_close(model.class_embeddings, expected)
    assert model.spec.mean == (0.485, 0.456, 0.406)
    save_model(model, tmp_path)
    again, images = load_model(tmp_path), torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)
    fresh = real(clip, monkeypatch)
    match_classes(fresh, model)
    assert torch.equal(fresh.class_embeddings, model.class_embeddings)


def test_wrong_options_are_refused(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"prompt_layers": 4}, "prompt_layers 4 must be in 0..3"),
        ({"prompts": 0}, "prompts positive"),
        ({"heads": 3}, "heads 3 must divide"),
        ({"unseen": [5]}, r"unseen classes \[5\]"),
        ({"unseen": "voc12"}, "pottedplant"),
        ({"backbone": "RN50-quickgelu"}, "is a ResNet"),
        ({"class_names": ["cat"]}, "1 entries, but the model has 5"),
        ({"weights": "openai"}, "no weights fit"),
    ):
        with pytest.raises(UserError, match=message):
            tiny(**options)
    with pytest.raises(UserError, match="class_names are needed"):
        real(clip, monkeypatch, weights=clip, class_names=None)


def test_weights_that_need_the_other_gelu_are_refused(tmp_path: Path) -> None:
    """A saved model would be built again from the name alone, with the wrong one."""
    torch.save(openai_state(tiny_clip()), tmp_path / "openai.pt")
    with pytest.raises(UserError, match="need quick GELU; choose backbone ViT-B-16-quickgelu"):
        zegclip.zegclip(num_classes=5, class_names=NAMES, backbone="ViT-B-16", weights=str(tmp_path / "openai.pt"))


# Learnable parameters and multiply-adds of one 512 crop, measured on the official code (its README: 13.8 M and 110.4 G,
# 14.6 M and 123.9 G), and those of the encoder alone.
PUBLISHED = {"voc12": (10, 20, 13_821_184, 108.7, 110.6), "coco_stuff164k": (100, 171, 14_650_624, 120.6, 124.2)}
SELF_ATTENTION = 3 * (4 * (512 * 512 + 512) + 2 * 512)  # of three layers with its norm, which never runs
LAST_LAYER = 2 * (512 * 512 + 512) + 2 * 512 * 2048 + 2048 + 512 + 4 * 512  # values, output, MLP and norms of the third


@torch.no_grad()
@pytest.mark.parametrize("data", ["voc12", pytest.param("coco_stuff164k", marks=pytest.mark.slow)])
def test_published_counts(data: str) -> None:
    prompts, classes, learnable, encoder, whole = PUBLISHED[data]
    with torch.device("meta"):
        model: Any = build_network("zegclip_vit_base", num_classes=classes, prompts=prompts)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == learnable - SELF_ATTENTION - LAST_LAYER
    model.requires_grad_(False)  # else the counter asks for gradients
    assert gmacs(model.backbone, (512, 512)) == pytest.approx(encoder, abs=0.051)
    # What the third layer makes of its attention is not computed here.
    unused = 1024 * 512 * 512 + classes * (1024 * 512 + 512 * 512 + 2 * 512 * 2048)
    assert gmacs(model, (512, 512)) + unused / 1e9 == pytest.approx(whole, abs=0.051)
