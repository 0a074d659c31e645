"""What every system owes the rest of the library, for every name in the catalogue."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from segvit.contracts import Classes, Dense, InputSpec
from segvit.model_folder import load_model, save_model
from segvit.zoo import MODELS, create_model, find_system

K = 5
CLASSES = Classes(("wall", "sky", "tree", "road", "car"), tuple((i, 2 * i, 9) for i in range(K)))
VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 128}
LEVELS: dict[str, Any] = VIT | {"out_indices": [0, 1, 2]}
RESNET: dict[str, Any] = {"backbone": "resnet18"}
PYRAMID: dict[str, Any] = {"backbone": "pvt_v2_b0"}
PVT: dict[str, Any] = {"depths": [1] * 4, "dims": [16, 16, 20, 32], "position_size": 64}
DPT: dict[str, Any] = {"decoder_intermediate_channels": [16, 16, 32, 32], "decoder_fusion_channels": 16}
CASTFORMER: dict[str, Any] = {
    "width": 32, "units": [1, 1, 1], "dim": 32, "heads": 2, "depth": 1, "iterations": 2, "grid": [4] * 4,
    "decoder_dim": 32,
}  # fmt: skip


SMALL_TEXT = {"width": 32, "layers": 1, "heads": 2}
DENSECLIP: dict[str, Any] = {
    "embed_dim": 16, "text": SMALL_TEXT, "decoder_dim": 16, "decoder_layers": 1, "fpn_dim": 16, "head_dim": 16
}  # fmt: skip
CLIP_RESNET = {"width": 8, "layers": [1, 1, 1, 1], "heads": 4}
CLIP_VIT = {"width": 64, "layers": 4, "heads": 2, "patch_size": 8}
ZEGCLIP: dict[str, Any] = VIT | {"joint_dim": 32, "prompts": 3, "layers": 2, "heads": 4}
ZSSEG: dict[str, Any] = PYRAMID | {
    "dilations": None, "regions": False, "embed_dim": 16, "dim": 64, "mask_dim": 16, "queries": 7, "layers": 2,
    "heads": 2, "hidden": 32, "embed_hidden": 32,
}  # fmt: skip
NO_SLOPE = r"k_proj\.bias"  # a key's bias adds the same to all scores of a query


class Family(NamedTuple):
    """How the models of a name's beginning are made tiny, and the grids they then have."""

    options: dict[str, Any]
    cell: int = 8  # images are padded to multiples of it
    stride: int = 8  # of the logits
    side: int = 32  # of training images; large enough that every map has several cells
    least: int = 1  # smaller images are padded to that many pixels a side
    additive: dict[str, Any] = {}  # of the criterion's options, those with which micro-batches add up
    silent: str = r"(?!)"  # parameters that the paper's initialisation leaves without a gradient


FAMILIES = {  # the longest that fits counts
    "segvit": Family(LEVELS | {"layers": 2}),
    "segvit_shrunk": Family(VIT | {"layers": 2, "out_indices": [0, 2], "shrink_at": 1}),
    "segmenter": Family(VIT | {"layers": 2}),
    "setr_naive": Family(LEVELS | {"width": 32}),
    "setr_pup": Family(LEVELS | {"width": 32}, stride=1),
    "setr_mla": Family(LEVELS | {"width": 32}, stride=2),
    "fcn": Family({}, side=64),
    "unet": Family(RESNET | {"decoder": {"decoder_channels": [32, 32, 16, 16, 8]}}, cell=32, stride=1, side=64),
    "pspnet": Family(RESNET, side=64),
    "fpn": Family(RESNET, cell=32, stride=4, side=64),
    "deeplabv3": Family(RESNET, side=64),
    "deeplabv3_plus": Family(RESNET, cell=16, stride=4, side=64),
    "lraspp": Family({}, cell=16, side=64),
    "upernet": Family(RESNET | {"decoder": {"decoder_channels": 32}}, cell=32, stride=4, side=64),
    "segformer": Family(RESNET, cell=32, stride=4, side=64),
    "dpt": Family({"backbone": "vit_tiny_patch16_224", "image_size": 64, "decoder": DPT}, cell=32, stride=1, side=64),
    "semantic_fpn": Family(PYRAMID | {"fpn_dim": 32, "head_dim": 32}, cell=32, stride=4, side=64),
    "semantic_fpn_pvt": Family(PVT | {"fpn_dim": 32, "head_dim": 32}, cell=1, stride=4, least=32, side=64),
    "semantic_fpn_pvt_v2": Family(PYRAMID | {"fpn_dim": 32, "head_dim": 32}, cell=32, stride=4, side=64),
    "ftn": Family({"depths": [1] * 4, "embed_dim": 32, "dim": 32}, cell=1, least=64, side=64),
    "ddrnet": Family(
        {"planes": 8, "spp_planes": 16, "head_planes": 16}, side=128, additive={"ohem": 0.0, "cross_entropy": 1.0}
    ),
    "denseclip": Family(DENSECLIP | PYRAMID | {"image_size": 64}, cell=32, stride=4, side=64, silent=NO_SLOPE),
    "denseclip_resnet": Family(
        DENSECLIP | {"vision": CLIP_RESNET, "image_size": 64}, cell=32, stride=4, side=64, silent=NO_SLOPE
    ),
    "denseclip_vit": Family(DENSECLIP | {"vision": CLIP_VIT, "image_size": 32}, stride=4, silent=NO_SLOPE),
    # The last convolution of the global gates starts at 0, so nothing before it is told anything at first.
    "duat": Family(PYRAMID | {"dim": 16}, cell=32, stride=1, side=64, silent=r"global_attention\.(mask\.|mlp\.[01]\.)"),
    "zegclip": Family(ZEGCLIP),
    # Queries start at 0, so at first they have nothing to say to each other.
    "zsseg": Family(ZSSEG, cell=32, stride=4, side=64, silent=r"layers\.0\.(self_attn\..*weight|norm1\.weight)"),
    "castformer": Family(CASTFORMER, cell=16, stride=4, least=32, side=64),
    "rsseg": Family(LEVELS | {"layers": 2, "dim": 32}),
    "rsseg_pyramid": Family(PYRAMID | {"layers": 2, "dim": 32}, cell=32, side=64),
    "setr_hlg": Family(
        {"dims": [32] * 4, "heads": [2] * 4, "depths": [1, 2, 1, 1], "width": 32}, cell=32, stride=4, side=128
    ),
}
# Names that share everything but the backbone, which is made tiny anyway, are one case of the slower checks.
KINDS = [
    "segvit_vit_tiny", "segvit_shrunk_vit_tiny", "segmenter_vit_tiny", "segmenter_linear_vit_base",
    "setr_naive_vit_tiny", "setr_pup_tiny", "setr_mla_vit_tiny", "setr_hlg_tiny",
    "lraspp", "unet", "pspnet", "segformer", "dpt", "semantic_fpn_pvt_tiny", "semantic_fpn_pvt_v2_b0", "ftn_tiny",
    "ddrnet_23_slim", "rsseg_vit_tiny", "duat_pvt_v2_b2", "denseclip", "denseclip_resnet50", "denseclip_vit_base",
    "zegclip_vit_base",
    "castformer_r50", "zsseg_resnet50",
]  # fmt: skip


def family(name: str) -> Family:
    return FAMILIES[max((key for key in FAMILIES if name.startswith(key)), key=len)]


def tiny(name: str, **options: Any) -> Any:
    """A tiny model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return create_model(name, classes=CLASSES, **(family(name).options | options)).eval()


def trunk(model: Any) -> Any:
    """The part that knows mean and deviation: the backbone, or the model where it has none of its own."""
    return dict(model.named_children()).get("backbone", model)


def no_dropout(name: str) -> dict[str, float]:
    """Options that switch off what is random in training."""
    return {rate: 0.0 for rate in ("dropout", "drop_path") if rate in inspect.signature(MODELS[name].build).parameters}


def freeze_statistics(model: nn.Module) -> None:
    """BatchNorm as in evaluation: its batch statistics are those of a micro-batch, by design."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def random_masks(count: int, height: int, width: int) -> Tensor:
    """Label maps in which some classes are absent and some pixels ignored."""
    masks = torch.randint(0, K - 1, (count, height, width))
    masks[0][masks[0] == 2] = 255
    return masks.to(torch.uint8)


def losses(
    name: str, out: Dense, masks: Tensor, totals: dict[str, Tensor] | None = None, **options: Any
) -> dict[str, Tensor]:
    system = find_system(name)
    if totals is None:
        totals = system.normalisers(masks, num_classes=K, ignore_index=255)
    return system.criterion(out, masks, totals, ignore_index=255, **options)


@pytest.mark.parametrize("name", MODELS)
def test_output(name: str) -> None:
    model = tiny(name)
    for size in ((32, 32), (37, 50)):
        with torch.no_grad():
            out = model(torch.randn(2, 3, *size))
        assert isinstance(out, Dense)
        assert out.logits.shape[:2] == (2, K)
        cell, stride, least = family(name).cell, family(name).stride, family(name).least
        assert out.covers == tuple(max(least, -(-side // cell) * cell) for side in size)
        assert out.logits.shape[-2:] == tuple(side // stride for side in out.covers)
        assert all(torch.isfinite(t).all() for t in (out.logits, *out.extras.values()))
    assert model.classes is CLASSES
    assert model.readout is MODELS[name].readout
    built = trunk(model)
    assert model.spec == InputSpec(mean=built.mean, std=built.std)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model, side = tiny(name).train(), family(name).side
    terms = losses(name, model(torch.randn(2, 3, side, side)), random_masks(2, side, side))
    for value in terms.values():
        assert value.shape == ()
        assert torch.isfinite(value)
        assert value > 0
    torch.stack(list(terms.values())).sum().backward()
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    zero = [key for key, p in model.named_parameters() if p.requires_grad and p.grad.abs().max() == 0]
    zero = [key for key in zero if not re.search(family(name).silent, key)]
    dropped = {"backbone.cls_token"} if vars(trunk(model)).get("prefix_tokens") == "drop" else set()
    assert set(zero) == dropped
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", KINDS)
def test_images_of_a_batch_are_independent(name: str) -> None:
    model, images = tiny(name), torch.randn(3, 3, 37, 50)
    with torch.no_grad():
        together = model(images)
        alone = [model(image[None]) for image in images]
    torch.testing.assert_close(together.logits, torch.cat([out.logits for out in alone]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (37, 50), (24, 61)])
def test_bands_are_rows_of_the_whole(name: str, size: tuple[int, int]) -> None:
    model, height = tiny(name), size[0]
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
        trimmed = model.readout.trim(out)
        whole = model.readout(out, size, range(height))
        assert whole.shape == (2, K, *size)
        assert torch.isfinite(whole).all()
        assert set(trimmed.extras) <= set(model.readout.keeps)
        torch.testing.assert_close(model.readout(trimmed, size, range(height)), whole, atol=0, rtol=0)
        for band in (1, 5, 16, height):
            bands = [range(top, min(top + band, height)) for top in range(0, height, band)]
            parts = [model.readout(trimmed, size, rows) for rows in bands]
            assert [part.shape for part in parts] == [(2, K, len(rows), size[1]) for rows in bands]
            torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_pixels_that_are_all_ignored(name: str) -> None:
    model = tiny(name).train()
    terms = losses(name, model(torch.randn(2, 3, 32, 32)), torch.full((2, 32, 32), 255, dtype=torch.uint8))
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(value == 0 for key, value in terms.items() if "mask" in key or "dice" in key)
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in trained)


@pytest.mark.parametrize("name", KINDS)
def test_normalisers_take_masks_of_any_integer_type(name: str) -> None:
    masks = random_masks(1, 32, 32)
    totals = find_system(name).normalisers(masks, num_classes=K, ignore_index=255)
    assert all(int(value) > 0 for value in totals.values())
    wide = masks.to(torch.int32)
    again = find_system(name).normalisers(wide, num_classes=K, ignore_index=255)
    assert {key: int(value) for key, value in again.items()} == {key: int(value) for key, value in totals.items()}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("empty_half", [False, True])
def test_micro_batches_add_up_to_the_whole_batch(name: str, empty_half: bool) -> None:
    model = tiny(name, **no_dropout(name)).double().train()
    freeze_statistics(model)
    images, masks = torch.randn(4, 3, 37, 50, dtype=torch.float64), random_masks(4, 37, 50)
    if empty_half:
        masks[2:] = 255
    halves = [slice(0, 1), slice(1, 2), slice(2, 4)]
    system = find_system(name)
    totals = system.normalisers(masks, num_classes=K, ignore_index=255)
    parts = [system.normalisers(masks[half], num_classes=K, ignore_index=255) for half in halves]
    assert all(value.shape == () for value in totals.values())
    assert all(int(value) == sum(int(part[key]) for part in parts) for key, value in totals.items())
    additive = family(name).additive
    whole = losses(name, model(images), masks, totals, **additive)
    terms = [losses(name, model(images[half]), masks[half], totals, **additive) for half in halves]
    for key, value in whole.items():
        added = torch.stack([part[key] for part in terms]).sum()
        torch.testing.assert_close(added, value, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.spec = InputSpec(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), scale=(64, 32), window=(32, 32), stride=(16, 16))
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path)
    assert not again.training
    assert (again.config, again.classes, again.spec) == (model.config, model.classes, model.spec)
    images = torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        mine, theirs = model(images), again(images)
    assert torch.equal(mine.logits, theirs.logits)
    assert mine.extras.keys() == theirs.extras.keys()
    assert all(torch.equal(value, theirs.extras[key]) for key, value in mine.extras.items())


@pytest.mark.parametrize("name", [name for name in KINDS if name != "segmenter_linear_vit_base"])
def test_export(name: str) -> None:
    model, images = tiny(name), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images).logits, model(images).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_bf16(name: str) -> None:
    side = family(name).side  # on maps of one cell torch's bf16 convolutions leave NaN in gradients now and then
    model, images = tiny(name), torch.randn(2, 3, side, side)
    masks = random_masks(2, side, side)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.train()(images)
    terms = losses(name, out, masks)
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        full = model.eval()(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(images)
    spread = full.logits.std()
    assert (half.logits.float() - full.logits).abs().mean() < 0.1 * spread
