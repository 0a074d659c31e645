"""DenseCLIP beyond the goldens: published counts, when words are read, ViTs and other backbones, official keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from segvit.contracts import Classes, Dense, UserError
from segvit.model_folder import load_state
from segvit.nn.flops import count_parameters
from segvit.systems import denseclip
from segvit.systems.denseclip import DenseCLIP, Levels, PostModel, PreModel, convert, criterion, fix_words, normalisers
from segvit.text.checkpoint import named_clip
from segvit.text.tokenize import tokenize
from segvit.zoo import build_network, create_model
from tests.counting import gmacs
from tests.text.clips import openai_state, tiny_clip

NAMES = ("wall", "street lamp", "dog")
K = len(NAMES)
SMALL: dict[str, Any] = {
    "num_classes": K, "class_names": NAMES, "embed_dim": 16, "text": {"width": 32, "layers": 1, "heads": 2},
    "decoder_dim": 16, "decoder_layers": 1, "fpn_dim": 8, "head_dim": 8, "image_size": 64,
}  # fmt: skip
RESNET: dict[str, Any] = {"vision": {"width": 8, "layers": [1, 1, 1, 1], "heads": 4}}
VIT: dict[str, Any] = {"clip": "ViT-B-16-quickgelu", "vision": {"width": 64, "layers": 4, "heads": 2, "patch_size": 16}}


def build(**options: Any) -> DenseCLIP:
    torch.manual_seed(0)
    return denseclip.denseclip_clip(**(SMALL | RESNET | options)).eval()


# Millions of parameters and multiply-adds at 512 and 1024 for 150 classes, without the text tower, measured on the
# official code. The README's are 50.3, 67.8, 105.3 M and 269.2, 346.3 G for the ResNets at 1024 (the ViT's 1043.1 G
# count each doubling four times, as old counters did).
PUBLISHED = {
    "resnet50": (50.2, 66.6, 268.1), "resnet101": (67.8, 85.7, 344.4), "vit_base": (105.3, 159.3, 867.5),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "resnet50")) for n in PUBLISHED])
def test_published_counts(name: str) -> None:
    with torch.device("meta"):
        model: Any = build_network(f"denseclip_{name}", num_classes=150)
    parameters, at_512, at_1024 = PUBLISHED[name]
    assert (count_parameters(model) - count_parameters(model.prompting.words)) / 1e6 == pytest.approx(
        parameters, abs=0.051
    )
    model.eval().prompting.plain()
    assert gmacs(model, (512, 512)) == pytest.approx(at_512, abs=0.051)
    assert gmacs(model, (1024, 1024)) == pytest.approx(at_1024, abs=0.051)


def test_names_decide_about_the_scores() -> None:
    model, images = build(), torch.randn(1, 3, 64, 64)
    turned = build(class_names=NAMES[::-1])
    with torch.no_grad():
        scores, other = (m(images).extras["score_map"] for m in (model, turned))
    torch.testing.assert_close(scores.flip(1), other, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(scores[:, 0], scores[:, 1], atol=1e-4)
    assert torch.equal(model.prompting.words.get_buffer("tokens"), tokenize(NAMES, context_length=4))


def test_the_catalogue_hands_over_the_names() -> None:
    classes = Classes(NAMES, ((0, 0, 0),) * K)
    options = {key: value for key, value in (SMALL | RESNET).items() if key not in ("num_classes", "class_names")}
    model: Any = create_model("denseclip_resnet50", classes=classes, **options)
    assert torch.equal(model.prompting.words.get_buffer("tokens"), tokenize(NAMES, context_length=4))
    assert model.config.options == options
    other: Any = create_model("denseclip_resnet50", classes=classes, class_names=["a", "b", "c"], **options)
    assert torch.equal(other.prompting.words.get_buffer("tokens"), tokenize(["a", "b", "c"], context_length=3))


def test_words_are_read_once_until_something_changes() -> None:
    model = build()
    prompting = model.prompting
    assert isinstance(prompting, PostModel)
    reads: list[Tensor] = []
    prompting.words.register_forward_hook(lambda module, args, out: reads.append(out))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first, again = model(images), model(images)
        assert len(reads) == 1
        assert torch.equal(first.logits, again.logits)
        prompting.contexts.add_(0.5)
        assert not torch.equal(model(images).extras["texts"], first.extras["texts"])
        assert len(reads) == 2
        state = model.state_dict()
        model.load_state_dict(state | {"prompting.contexts": state["prompting.contexts"] - 0.5})
        torch.testing.assert_close(model(images).logits, first.logits)
        assert len(reads) == 3
    model(images).logits.sum().backward()
    assert len(reads) == 4
    assert prompting.contexts.grad is not None
    assert all(p.grad is None for p in prompting.words.parameters())


def test_fixed_words_need_no_text_tower() -> None:
    model, images = build(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(images).logits
        fix_words(model)
        assert not any("tower" in key for key in model.state_dict())
        torch.testing.assert_close(model(images).logits, expected)
    with pytest.raises(UserError, match="prompting post"):
        fix_words(build(prompting="pre"))


def test_pre_model_prompting_makes_words_of_the_image() -> None:
    model, images = build(prompting="pre"), torch.randn(2, 3, 64, 64)
    assert isinstance(model.prompting, PreModel)
    out = model.train()(images)
    assert out.extras["texts"].shape == (2, K, 16)
    assert not torch.allclose(out.extras["texts"][0], out.extras["texts"][1], atol=1e-6)
    out.logits.square().mean().backward()
    assert all(p.grad is not None for p in model.prompting.parameters() if p.requires_grad)
    with torch.no_grad():
        alone = model.eval()(images[:1]).logits
        torch.testing.assert_close(alone, model(images).logits[:1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "grid"), [((64, 96), (4, 6)), ((50, 83), (4, 6)), ((16, 80), (1, 5))])
def test_levels_of_a_vit(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """The blocks by thirds, the joint space behind the last one whatever the blocks are."""
    model = build(**VIT, out_indices=[0, 0, 2, 1])
    maps: list[list[Tensor]] = []
    model.fpn.register_forward_hook(lambda module, args, out: maps.append(args[0]))
    with torch.no_grad():
        out = model(torch.randn(1, 3, *size))
    assert out.covers == (16 * grid[0], 16 * grid[1])
    assert out.extras["score_map"].shape == (1, K, *grid)
    rows, columns = grid
    half = (max(rows // 2, 1), max(columns // 2, 1))
    assert [x.shape[1:] for x in maps[0]] == [
        (64, 4 * rows, 4 * columns), (64, 2 * rows, 2 * columns), (64 + K, *grid), (64, *half)
    ]  # fmt: skip
    assert build(**VIT).backbone.out_indices == (0, 1, 3)


def test_levels_are_made_from_their_places(seeded: torch.Generator) -> None:
    levels, maps = Levels(8, [1, 0, 0, 1]).eval(), [torch.randn(1, 8, 4, 5), torch.randn(1, 8, 4, 5)]
    with torch.no_grad():
        _, double, same, half = levels(maps)
    torch.testing.assert_close(same, F.group_norm(maps[0], 1))
    torch.testing.assert_close(half, F.max_pool2d(F.group_norm(maps[1], 1), 2))
    _, up = levels.layers[1]
    torch.testing.assert_close(double, F.conv_transpose2d(same, up.weight, up.bias, stride=2))


def test_levels_of_patches_of_8(seeded: torch.Generator) -> None:
    """As the official code builds them for that patch: twice, once, half and a quarter; scores join the second."""
    levels, maps = Levels(8, [0, 0, 0, 0], fine=True).eval(), [torch.randn(1, 8, 4, 6)]
    with torch.no_grad():
        double, same, half, quarter = levels(maps)
    normed = F.group_norm(maps[0], 1)
    torch.testing.assert_close(same, normed)
    torch.testing.assert_close(half, F.max_pool2d(normed, 2))
    torch.testing.assert_close(quarter, F.max_pool2d(normed, 4))
    assert double.shape == (1, 8, 8, 12)
    model = build(clip="ViT-B-16-quickgelu", vision=VIT["vision"] | {"patch_size": 8})
    assert model.scored == 1
    with torch.no_grad():
        out = model(torch.randn(1, 3, 32, 48))
    assert (out.logits.shape, out.extras["score_map"].shape) == ((1, K, 8, 12), (1, K, 4, 6))


def test_any_pyramid() -> None:
    options = SMALL | {"backbone": "resnet18", "drop_path": 0.1}
    model = denseclip.denseclip(**options).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 40, 70))
    assert (out.covers, out.logits.shape, out.extras["score_map"].shape) == ((64, 96), (1, K, 16, 24), (1, K, 2, 3))
    with pytest.raises(UserError, match="twice the one before"):
        denseclip.denseclip(**(SMALL | {"backbone": "xcit_nano_12_p8_224"}))


def test_loss(seeded: torch.Generator) -> None:
    masks = torch.randint(0, K, (2, 20, 30), dtype=torch.uint8)
    masks[0, :10] = 255
    scores = torch.randn(2, K, 2, 3)
    out = Dense(torch.randn(2, K, 5, 8), {"score_map": scores}, (20, 32))
    totals = normalisers(masks, num_classes=K, ignore_index=255)
    terms = criterion(out, masks, totals, score_map=0.4, temperature=0.07)
    assert list(terms) == ["loss_ce", "loss_score_map"]
    for name, logits, weight in (("loss_ce", out.logits, 1.0), ("loss_score_map", scores / 0.07, 0.4)):
        full = F.interpolate(logits, size=(20, 32), mode="bilinear", align_corners=False)[..., :30]
        mean = F.cross_entropy(full, masks.long(), ignore_index=255, reduction="none").mean()
        torch.testing.assert_close(terms[name], weight * mean)
    assert list(criterion(out, masks, totals, score_map=0.0, cross_entropy=0.0, dice=1.0)) == ["loss_dice"]
    with pytest.raises(UserError, match="temperature 0"):
        criterion(out, masks, totals, temperature=0.0)


def official_vit(model: DenseCLIP) -> dict[str, Tensor]:
    """The official names of a whole DenseCLIP with a ViT, written out."""
    pairs = {
        "backbone.patch_embed.proj.": "backbone.conv1.", "backbone.norm_pre.": "backbone.ln_pre.",
        "backbone.embedding.norm.": "backbone.ln_post.", "backbone.blocks.": "backbone.transformer.resblocks.",
        ".norm1.": ".ln_1.", ".norm2.": ".ln_2.", ".attn.qkv.": ".attn.in_proj_", ".attn.proj.": ".attn.out_proj.",
        ".mlp.fc1.": ".mlp.c_fc.", ".mlp.fc2.": ".mlp.c_proj.",
    }  # fmt: skip
    rest = {
        "levels.layers.2.0.": "backbone.fpn3.", "levels.layers.0.": "backbone.fpn1.",
        "levels.layers.1.": "backbone.fpn2.", "levels.layers.3.": "backbone.fpn4.",
        "prompting.words.tower.": "text_encoder.", "prompting.decoder.blocks.": "context_decoder.decoder.",
        "prompting.decoder.": "context_decoder.", "prompting.": "", "fpn.lateral.": "neck.lateral_convs.",
        "fpn.output.": "neck.fpn_convs.", "head.classify.": "decode_head.conv_seg.",
    }  # fmt: skip
    special = {
        "backbone.cls_token": ("backbone.class_embedding", lambda x: x[0, 0]),
        "backbone.pos_embed": ("backbone.positional_embedding", lambda x: x[0]),
        "backbone.embedding.proj.weight": ("backbone.proj", lambda x: x.T),
    }
    theirs = {}
    for key, value in model.state_dict().items():
        if key in special:
            name, change = special[key]
            theirs[name] = change(value)
            continue
        if key.startswith("head.scales."):
            _, _, scale, place, kind = key.split(".")
            part = "conv" if int(place) % 4 == 0 else "bn"
            theirs[f"decode_head.scale_heads.{scale}.{int(place) // 4 * 2}.{part}.{kind}"] = value
            continue
        name = key
        for ours, other in (pairs if key.startswith("backbone.") else rest).items():
            name = name.replace(ours, other)
        if name.startswith("neck."):
            name = f"{name.rpartition('.')[0]}.conv.{name.rpartition('.')[2]}"
        theirs[name] = value
    return theirs


def test_official_vit() -> None:
    source, model = build(**VIT, text_length=5), build(**VIT, text_length=5)
    theirs = official_vit(source)
    assert {"backbone.fpn3.weight", "backbone.fpn1.2.running_mean", "gamma", "text_encoder.ln_final.bias"} <= set(
        theirs
    )
    assert theirs["text_encoder.positional_embedding"].shape == (13, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_state(model, convert(theirs), source="test")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ("wall", "Wall", "dog")}, "names two classes"),
        ({"class_names": ("wall", "dog")}, "3 classes need one name each"),
        ({"class_names": ("wall", ["dog", "hound"], "cat")}, "without synonyms"),
        ({"class_names": ("wall", "old street lamp post", "cat"), "text_length": 5}, "shorten the name"),
        ({"class_names": ("wall", "old " * 70, "cat")}, "do not fit into 77"),
        ({"out_indices": [0, 1, 2, 3]}, "for CLIP's ViTs"),
        (VIT | {"out_indices": [0, 1, 2]}, "give four of the 4 blocks"),
        (VIT | {"out_indices": [0, 1, 2, 4]}, "give four of the 4 blocks"),
        ({"vision": {"colour": 3}}, "sizes of CLIP's towers"),
        ({"weights": "nowhere.pt"}, "no such file"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


def test_the_name_must_have_the_gelu_of_the_weights(tmp_path: Path) -> None:
    """Weights are not asked again when a saved model is built, the name alone is."""
    path = str(tmp_path / "clip.safetensors")
    save_file(openai_state(tiny_clip()), path)
    with pytest.raises(UserError, match="name the model ViT-B-16-quickgelu"):
        named_clip("ViT-B-16", path)
    assert named_clip("ViT-B-16-quickgelu", path).vision.quick_gelu
    with pytest.raises(UserError, match="has its own sizes"):
        named_clip("ViT-B-16-quickgelu", path, embed_dim=8)
