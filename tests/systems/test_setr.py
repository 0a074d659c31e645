"""SETR beyond the goldens: published counts, auxiliary heads and losses, decoders by hand, official layouts, HLG."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.contracts import Dense, UserError
from segvit.model_folder import load_state
from segvit.nn.flops import count_parameters
from segvit.systems import setr
from segvit.systems.setr import SETR, convert, criterion, normalisers
from segvit.zoo import MODELS, build_network

K = 4
TINY: dict[str, Any] = {
    "num_classes": K, "backbone": "vit_tiny_patch16_224", "image_size": 64, "patch_size": 16, "depth": 4,
    "embed_dim": 64, "out_indices": (0, 1, 2, 3), "width": 32,
}  # fmt: skip
DECODERS = ("naive", "pup", "mla")
BILINEAR: dict[str, Any] = {"mode": "bilinear", "align_corners": False}


def build(decoder: str, **options: Any) -> SETR:
    torch.manual_seed(0)
    prefix = {"prefix_tokens": "drop"} if decoder == "mla" else {}
    return setr.setr(**(TINY | prefix | {"decoder": decoder} | options)).eval()


def build_hlg(**options: Any) -> SETR:
    torch.manual_seed(0)
    sizes = {"dims": (32, 32, 64, 64), "heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1), "width": 64}
    return setr.setr_hlg(**({"num_classes": K, "backbone": "hlg_tiny"} | sizes | options)).eval()


# Parameters as measured on the official code by part, every head with its conv_seg, which never runs: 512 K + K.
PUBLISHED: dict[tuple[str, int, int], dict[str, int]] = {
    ("naive", 768, 19): {"backbone": 305_458_176, "head": 279_590, "aux": 279_590},
    ("pup", 768, 19): {"backbone": 305_458_176, "head": 4_148_518, "aux": 2_376_742},
    ("mla", 768, 19): {"backbone": 308_878_336, "head": 1_868_838, "aux": 14_611},
    ("naive", 512, 150): {"backbone": 304_147_456, "head": 380_460, "aux": 380_460},
    ("pup", 512, 150): {"backbone": 304_147_456, "head": 4_249_388, "aux": 2_477_612},
    ("mla", 512, 150): {"backbone": 307_567_616, "head": 2_539_820, "aux": 115_350},
}


@pytest.mark.parametrize(("decoder", "side", "classes"), PUBLISHED)
def test_published_parameters(decoder: str, side: int, classes: int) -> None:
    with torch.device("meta"):
        model: Any = build_network(f"setr_{decoder}_vit_large", num_classes=classes, image_size=side)
    published, unused = PUBLISHED[decoder, side, classes], 512 * classes + classes
    inside = [model.backbone] if model.aggregation is None else [model.backbone, model.aggregation]
    assert sum(count_parameters(part) for part in inside) == published["backbone"]
    assert count_parameters(model.head) + unused == published["head"]
    assert [count_parameters(aux) + unused for aux in model.aux_heads.values()] == (
        [published["aux"]] * (3 if decoder == "naive" else 4)
    )
    expected = (5, 11, 17, 23) if decoder == "mla" else (9, 14, 19, 23)
    assert model.backbone.out_indices == expected


def test_the_short_name() -> None:
    assert MODELS["setr_pup_tiny"].build is MODELS["setr_pup_vit_tiny"].build


def by_hand(model: SETR, images: Tensor, decoder: str) -> Tensor:
    """The official head, step by step, up to the size of the image."""
    side = images.shape[-1]
    head: Any = model.head
    maps = model.backbone(images).maps
    if decoder == "mla":
        aggregation: Any = model.aggregation
        p2, p3, p4, p5 = (
            reduce(norm(m)) for reduce, norm, m in zip(aggregation.reduce, aggregation.norms, maps, strict=True)
        )
        sums = (p5 + p4 + p3 + p2, p5 + p4 + p3, p5 + p4, p5)
        levels = [smooth(x) for smooth, x in zip(aggregation.smooth, sums, strict=True)]
        large = [
            F.interpolate(branch(x), scale_factor=4, mode="bilinear", align_corners=True)
            for branch, x in zip(head.branches, levels, strict=True)
        ]
        return F.interpolate(head.classify(torch.cat(large, dim=1)), size=side, **BILINEAR)
    x = head.norm(maps[-1])
    for conv in head.convs[:-1]:
        x = F.interpolate(conv(x), scale_factor=2, **BILINEAR)
    x = head.classify(head.convs[-1](x))
    x = F.interpolate(x, scale_factor=2, **BILINEAR) if decoder == "pup" else x
    return F.interpolate(x, size=side, **BILINEAR)


def disturb(model: nn.Module) -> None:
    """Weights and statistics away from their initialisation, so that nothing is the identity by accident."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if (
                isinstance(module, nn.BatchNorm2d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_scores_at_the_original_size(decoder: str, seeded: torch.Generator) -> None:
    model = build(decoder)
    disturb(model)
    images = torch.randn(2, 3, 64, 64)
    out = model(images)
    scores = setr.READOUT(out, (64, 64), range(64))
    assert out.covers == (64, 64)
    assert out.logits.shape[-1] == {"naive": 4, "pup": 32, "mla": 16}[decoder]
    torch.testing.assert_close(scores, by_hand(model, images, decoder), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_odd_sizes_are_read_over_the_padded_area(decoder: str, seeded: torch.Generator) -> None:
    model = build(decoder)
    out = model(torch.randn(1, 3, 37, 85))
    assert out.covers == (48, 96)
    full = F.interpolate(out.logits, size=(48, 96), **BILINEAR)[..., :37, :85]
    torch.testing.assert_close(setr.READOUT(out, (37, 85), range(37)), full, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_auxiliary_heads_of_pup(seeded: torch.Generator) -> None:
    """The official order: convolution, four times as large, classifier, the image's size."""
    model = build("pup").train()
    disturb(model)
    images = torch.randn(2, 3, 64, 64)
    assert list(model.aux_heads) == ["0", "1", "2", "3"]
    out = model(images)
    maps = model.backbone(images).maps
    for level, aux in model.aux_heads.items():
        assert (aux.convs[0][0].kernel_size, len(aux.convs)) == ((3, 3), 1)
        x = F.interpolate(aux.convs[0](aux.norm(maps[int(level)])), scale_factor=4, **BILINEAR)
        torch.testing.assert_close(out.extras[f"aux{level}_logits"], aux.classify(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_auxiliary_heads_of_naive_and_mla(seeded: torch.Generator) -> None:
    images = torch.randn(2, 3, 64, 64)
    naive, mla = build("naive"), build("mla")
    for model in (naive, mla):
        disturb(model)
        model.train()
    assert list(naive.aux_heads) == ["0", "1", "2"]
    out, maps = naive(images), naive.backbone(images).maps
    for level in range(3):
        aux: Any = naive.aux_heads[str(level)]
        assert aux.convs[0][0].kernel_size == (1, 1)
        expected = aux.classify(aux.convs[0](aux.norm(maps[level])))
        torch.testing.assert_close(out.extras[f"aux{level}_logits"], expected)
    assert list(mla.aux_heads) == ["0", "1", "2", "3"]
    out, maps = mla(images), mla.aggregation(mla.backbone(images).maps)
    for level in range(4):
        aux = mla.aux_heads[str(level)]
        assert aux.classify.bias is None
        torch.testing.assert_close(out.extras[f"aux{level}_logits"], aux.classify(maps[level]))


@pytest.mark.parametrize("decoder", DECODERS)
def test_auxiliary_heads_run_in_training_only(decoder: str) -> None:
    model, images = build(decoder), torch.randn(2, 3, 32, 32)
    assert model(images).extras == {}
    assert model.train()(images).extras.keys() == {f"aux{level}_logits" for level in model.aux_heads}


def test_losses_are_means_over_all_pixels(seeded: torch.Generator) -> None:
    masks = torch.randint(0, K, (2, 20, 30), dtype=torch.uint8)
    masks[0, :10] = 255
    logits = {"": torch.randn(2, K, 5, 8), "_0": torch.randn(2, K, 10, 16), "_3": torch.randn(2, K, 5, 8)}
    out = Dense(logits[""], {"aux0_logits": logits["_0"], "aux3_logits": logits["_3"]}, (20, 32))
    totals = normalisers(masks, num_classes=K, ignore_index=255)
    losses = criterion(out, masks, totals)
    assert losses.keys() == {"loss_ce", "loss_ce_0", "loss_ce_3"}
    for suffix, value in logits.items():
        full = F.interpolate(value, size=(20, 32), **BILINEAR)[..., :30]
        mean = F.cross_entropy(full, masks.long(), ignore_index=255, reduction="none").mean()
        torch.testing.assert_close(losses[f"loss_ce{suffix}"], mean * (1.0 if suffix == "" else 0.4))
    half = criterion(out, masks, totals, aux_weight=0.2)
    torch.testing.assert_close(half["loss_ce_0"], losses["loss_ce_0"] / 2)
    more = criterion(out, masks, totals, cross_entropy=0.5, dice=1.0, class_weights=torch.full((K,), 2.0))
    assert more.keys() == {f"loss_{name}{suffix}" for name in ("ce", "dice") for suffix in logits}
    torch.testing.assert_close(more["loss_ce_3"], losses["loss_ce_3"])


def test_the_class_token() -> None:
    """It takes part in naive and PUP; MLA drops it before the first block."""
    images = torch.randn(1, 3, 64, 64)
    for decoder in DECODERS:
        model = build(decoder)
        model(images).logits.square().sum().backward()
        assert (model.backbone.cls_token.grad.abs().max() > 0) == (decoder != "mla")
    kept: Any = build_network("setr_mla_vit_tiny", prefix_tokens="keep", **{k: TINY[k] for k in ("num_classes", "depth",
        "embed_dim", "out_indices")})  # fmt: skip
    assert kept.backbone.prefix_tokens == "keep"
    dropped: Any = build_network("setr_mla_deit_base", num_classes=2, depth=12, embed_dim=64)
    assert (dropped.backbone.prefix_tokens, dropped.backbone.out_indices) == ("drop", (2, 5, 8, 11))


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_the_recipes_call_a_head(decoder: str) -> None:
    """Ten times the learning rate goes to names with `head`: MLA's aggregation is part of the official backbone."""
    model = build(decoder)
    fast = {name.split(".")[0] for name, _ in model.named_parameters() if "head" in name}
    slow = {name.split(".")[0] for name, _ in model.named_parameters() if "head" not in name}
    assert fast == {"head", "aux_heads"}
    assert slow == ({"backbone", "aggregation"} if decoder == "mla" else {"backbone"})


@pytest.mark.parametrize("decoder", DECODERS)
def test_norms_and_randomness(decoder: str) -> None:
    model = build(decoder, drop_path=0.3)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout | nn.Dropout2d)} == {0.0}
    assert model.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.backbone.position_mode == "bilinear"
    assert isinstance(model.backbone.norm, nn.Identity)
    biased = {m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
    assert biased == {"naive": set(), "pup": {True}, "mla": {True, False}}[decoder]


def official(decoder: str, model: SETR) -> dict[str, Tensor]:
    """The model's weights under the authors' names, with what their checkpoints hold besides."""
    levels, state = range(4), model.state_dict()
    theirs: dict[str, str] = {key: key for key in state if key.startswith("backbone.")}
    counts = {"head": 1 if decoder == "naive" else 4}
    heads = {"head": "decode_head", **{f"aux_heads.{i}": f"auxiliary_head.{i}" for i in model.aux_heads}}
    if decoder == "mla":
        theirs |= {f"aggregation.norms.{i}.{end}": f"backbone.norm_{i}.{end}" for i in levels for end in ENDS[:2]}
        for i, (part, name) in ((i, pair) for i in levels for pair in (("reduce", "_1x1"), ("smooth", ""))):
            ours, name = f"aggregation.{part}.{i}", f"backbone.mla.mla_p{i + 2}{name}"
            theirs |= {f"{ours}.0.weight": f"{name}.0.weight"} | {f"{ours}.1.{end}": f"{name}.1.{end}" for end in ENDS}
        for i, conv in ((i, conv) for i in levels for conv in (0, 1)):
            ours, name = f"head.branches.{i}.{conv}", f"decode_head.mlahead.head{i + 2}"
            theirs[f"{ours}.0.weight"] = f"{name}.{3 * conv}.weight"
            theirs |= {f"{ours}.1.{end}": f"{name}.{3 * conv + 1}.{end}" for end in ENDS}
        theirs |= {f"head.classify.{end}": f"decode_head.cls.{end}" for end in ENDS[:2]}
        theirs |= {f"aux_heads.{i}.classify.weight": f"auxiliary_head.{i}.aux.weight" for i in levels}
    else:
        for ours, name in heads.items():
            count = counts.get(ours, 1)
            theirs |= {f"{ours}.norm.{end}": f"{name}.norm.{end}" for end in ENDS[:2]}
            theirs |= {f"{ours}.classify.{end}": f"{name}.conv_{count}.{end}" for end in ENDS[:2]}
            for i in range(count):
                theirs |= {f"{ours}.convs.{i}.0.{end}": f"{name}.conv_{i}.{end}" for end in ENDS[:2]}
                theirs |= {f"{ours}.convs.{i}.1.{end}": f"{name}.syncbn_fc_{i}.{end}" for end in ENDS}
    unused = {f"{name}.conv_seg.{end}": torch.zeros(K) for name in heads.values() for end in ENDS[:2]}
    return {theirs[key]: value for key, value in state.items()} | unused


ENDS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("decoder", DECODERS)
def test_official_checkpoints_convert(decoder: str) -> None:
    model = build(decoder)
    theirs, state = official(decoder, model), model.state_dict()
    ours = convert(theirs)
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[key], value) for key, value in state.items())
    with pytest.raises(UserError, match="unknown"):
        load_state(model, convert(theirs | {"decode_head.surprise": torch.ones(1)}), source="test")


def test_the_official_hlg_decoder_does_not_convert() -> None:
    with pytest.raises(UserError, match="give the file as weights"):
        convert({"backbone.block1.0.q.weight": torch.zeros(1), "decode_head.x": torch.zeros(1)})


@pytest.mark.parametrize("size", [(64, 64), (45, 100)])
@torch.no_grad()
def test_hlg(size: tuple[int, int], seeded: torch.Generator) -> None:
    model, images = build_hlg(), torch.randn(2, 3, *size)
    out = model(images)
    assert out.covers == tuple(-(-side // 32) * 32 for side in size)
    assert out.logits.shape == (2, K, out.covers[0] // 4, out.covers[1] // 4)
    assert list(model.aux_heads) == ["2"]
    assert model.train()(images).extras["aux2_logits"].shape == (2, K, out.covers[0] // 16, out.covers[1] // 16)


def test_the_parts_of_hlg() -> None:
    model: Any = build_hlg(dropout=0.2, drop_path=0.3)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout2d)} == {0.2}
    assert model.backbone.stages[-1][-1].drop_path.drop_prob == pytest.approx(0.3)
    assert [layer.dilated for layer in model.head.layers] == [False, True]
    assert [layer.attention.heads for layer in model.head.layers] == [2, 2]
    assert model.head.fuse[0].in_channels == 32 + 32 + 64 + 64
    large: Any = build_hlg(width=None)
    assert (large.head.classify.in_channels, large.head.layers[0].attention.heads) == (512, 16)
    assert large.aux_heads["2"].classify.in_channels == 256


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_setr_on_hlg(decoder: Any, seeded: torch.Generator) -> None:
    model, images = build_hlg(decoder=decoder), torch.randn(2, 3, 64, 96)
    out = model.train()(images)
    finest = {"naive": 32, "pup": 4, "mla": 4}[decoder]
    assert out.logits.shape == (2, K, 64 // finest, 96 // finest)
    assert len(out.extras) == (3 if decoder == "naive" else 4)


@pytest.mark.parametrize("name", [*DECODERS, "hlg"])
def test_it_learns(name: str, seeded: torch.Generator) -> None:
    """Brightness tells the class, in images whose class changes in the middle."""
    model = build_hlg(dropout=0.0, drop_path=0.0) if name == "hlg" else build(name, patch_size=8, depth=4)
    masks = torch.randint(0, K, (4, 2), dtype=torch.uint8).repeat_interleave(32, dim=1)[:, None].repeat(1, 64, 1)
    images = (masks[:, None] - 1.5) + 0.1 * torch.randn(4, 3, 64, 64)
    totals = normalisers(masks, num_classes=K, ignore_index=255)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    log: list[float] = []
    for _ in range(10):
        terms = criterion(model(images), masks, totals)
        log.append(terms["loss_ce"].item())
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert log[-1] < 0.5 * log[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "pup", "dropout": 0.1}, "decoder pup has no dropout"),
        ({"width": 48}, "its width 48 must be a multiple of 32"),
        ({"decoder": "mla", "width": 33}, "so 33 must be even"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_hlg(**options)
