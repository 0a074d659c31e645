"""LV-Adapter by its behaviour: no effect at first, words that matter, the alignment, folders without a text tower."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.adapters.catalogue import attach
from segvit.adapters.files import save_adapter
from segvit.adapters.lv_adapter import TEMPERATURE, losses, lv_adapter, normalisers
from segvit.backbones.clip import clip_backbone
from segvit.backbones.pyramid import pyramid
from segvit.backbones.vit import plain_vit
from segvit.contracts import Classes, UserError
from segvit.model_folder import load_model, save_model
from segvit.text.embeddings import class_embeddings
from segvit.text.tower import text_tower
from segvit.zoo import adapt, create_model
from tests.text.clips import clip_file, text_file

NAMES = ("road", "traffic_light", "sky")
SMALL: dict[str, Any] = {"width": 32, "heads": 4}
TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 64}
BACKBONES: dict[str, Any] = {
    "resnet": lambda: pyramid("resnet10t"),
    "swin": lambda: pyramid("swin_tiny_patch4_window7_224", image_size=64),
    "vit": lambda: plain_vit("vit_tiny_patch16_224", image_size=64, depth=4, embed_dim=64, out_indices=[1, 3]),
}


def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def shake(network: Any) -> None:
    torch.manual_seed(2)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def built(name: str, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    network = BACKBONES[name]().requires_grad_(False).eval()
    given = {"class_names": NAMES, "text_weights": text_file()} | SMALL | options
    return network, lv_adapter(network, **given)


def model(**options: Any) -> Any:
    torch.manual_seed(0)
    table = Classes(NAMES, ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
    network = create_model("segmenter_vit_tiny", classes=table, layers=1, **TINY)
    adapt(network, "lv_adapter", text_weights=text_file(), **SMALL, **options)
    return network.eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_the_start_is_the_frozen_network(name: str) -> None:
    network, handle = built(name)
    out = network(images())
    handle.disable()
    before = network(images())
    handle.enable()
    assert all(torch.equal(a, b) for a, b in zip(out.maps, before.maps, strict=True))
    stages = len(handle.changes)
    assert set(out.extras) == {f"lv_map{i}" for i in range(1, stages + 1)}
    assert all(value.shape[1] == 3 for value in out.extras.values())
    shake(network)
    out = network(images())
    assert not torch.allclose(out.maps[-1], before.maps[-1], atol=1e-3)
    sum(m.square().mean() for m in [*out.maps, *out.extras.values()]).backward()  # type: ignore[union-attr]
    assert all(network.get_parameter(key).grad is not None for key in handle.names)


def test_clips_resnet_has_stages_too(tmp_path: Path) -> None:
    network = clip_backbone(weights=str(clip_file(tmp_path / "rn.safetensors", "rn"))).requires_grad_(False).eval()
    before = network(images())
    handle = attach_to(network)
    assert torch.equal(network(images()).extras["dense"], before.extras["dense"])
    shake(network)
    assert not torch.allclose(network(images()).extras["dense"], before.extras["dense"], atol=1e-3)
    assert [change.path for change in handle.changes] == ["gaps.1", "gaps.2", "gaps.3", "gaps.4"]


def attach_to(backbone: Any) -> Any:
    return lv_adapter(backbone, class_names=NAMES, text_weights=text_file(), **SMALL)


def test_the_vectors_are_the_text_tower_s_and_stay() -> None:
    _, handle = built("vit", templates="zegclip_voc")
    expected = class_embeddings(
        text_tower(None, weights=text_file()), ["road", "traffic light", "sky"], templates="zegclip_voc"
    )
    [name] = [name for name in handle.tensors() if name.endswith("embeddings")]
    assert torch.equal(handle.tensors()[name], expected)
    assert name not in handle.names
    assert sum(key.endswith("prior.offsets") for key in handle.names) == 1
    _, fixed = built("vit", learn_offsets=False)
    assert set(handle.names) - set(fixed.names) == {name.replace("embeddings", "offsets")}


def test_other_words_give_another_output() -> None:
    outputs = []
    for names in (NAMES, ("road", "cat", "sky"), ("road", "sky", "traffic_light")):
        network, _ = built("vit", class_names=names)
        shake(network)
        outputs.append(network(images()))
    first, other, permuted = outputs
    assert not torch.allclose(first.maps[-1], other.maps[-1], atol=1e-4)
    # Each class has its offset, which does not move along; the scores' channels do.
    assert not torch.allclose(first.extras["lv_map1"], permuted.extras["lv_map1"], atol=1e-4)


def test_scores_are_cosines_over_the_temperature() -> None:
    network, _ = built("vit")
    shake(network)
    scores = network(images()).extras["lv_map2"]
    assert scores.shape == (2, 3, 4, 6)
    assert scores.abs().max() <= 1 / TEMPERATURE + 1e-4


def test_the_alignment_loss() -> None:
    network = model()
    shake(network)
    x = images()
    out = network(x)
    masks = torch.randint(3, (2, 64, 96), dtype=torch.uint8)
    masks[:, :20] = 255
    found = losses(out, masks, normalisers(masks, ignore_index=255), ignore_index=255)["loss_lv"]
    maps = [value for name, value in out.extras.items() if name.startswith("lv_map")]
    assert len(maps) == 4
    each = [
        F.cross_entropy(
            F.interpolate(value, size=(64, 96), mode="bilinear", align_corners=False), masks.long(), ignore_index=255
        )
        for value in maps
    ]
    torch.testing.assert_close(found, 0.4 * torch.stack(each).mean())


def test_folders_need_no_text_tower(tmp_path: Path) -> None:
    shutil.copyfile(text_file(), tmp_path / "text.safetensors")
    table = Classes(NAMES, ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
    torch.manual_seed(0)
    base = create_model("segmenter_vit_tiny", classes=table, layers=1, **TINY)
    save_model(base, tmp_path / "base")
    network = load_model(tmp_path / "base")
    adapt(network, "lv_adapter", text_weights=str(tmp_path / "text.safetensors"), **SMALL)
    shake(network)
    save_adapter(network, tmp_path / "adapter", base="../base")
    save_model(network, tmp_path / "model")
    (tmp_path / "text.safetensors").unlink()
    expected = network.eval()(images()).logits
    for folder in ("adapter", "model"):
        torch.testing.assert_close(load_model(tmp_path / folder)(images()).logits, expected, rtol=1e-5, atol=1e-5)
    assert network.config.adapter is not None
    assert network.config.adapter["options"] == SMALL | {"text_dim": 16, "text_weights": None, "text_model": None}


def test_the_model_s_own_class_names_are_used() -> None:
    own = model().adapter.tensors()
    network, given = built("vit")
    name = "gaps.1.prior.embeddings"
    assert torch.equal(own[name], given.tensors()[name])
    assert network.get_buffer(name).shape == (3, 16)


def test_the_bottlenecks_budget_of_the_card() -> None:
    """2.8 M over ResNet-50's stages with a quarter of the channels; and the words' part at width 256."""
    with torch.device("meta"):
        network = pyramid("resnet50").requires_grad_(False)
        handle = lv_adapter(network, class_names=[str(i) for i in range(19)], text_dim=512)
    counts = {name: network.get_parameter(name).numel() for name in handle.names}
    bottlenecks = sum(count for name, count in counts.items() if any(f".{p}." in name for p in ("down", "mix", "up")))
    assert bottlenecks == pytest.approx(2.8e6, abs=2e4)
    assert sum(counts.values()) == 6_288_704 + 512 * 256 + 256 + 19 * 512


@pytest.mark.parametrize(("options", "message"), [
    ({"text_weights": None}, "needs the text tower of a trained CLIP"),
    ({"text_dim": 16}, "excludes text_weights"), ({"text_weights": "gone.safetensors"}, "no such file"),
    ({"text_weights": "openai", "text_model": "ViT-B-16"}, "cannot be downloaded"),
    ({"width": 30}, "heads divide width"), ({"class_names": ["a", "a"]}, "names two classes"),
    ({"num_classes": 4}, "class_names has 3 entries, but the model has 4"),
])  # fmt: skip
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built("vit", **options)
    with pytest.raises(UserError, match="has no option 'names'"):
        attach(create_model("segmenter_vit_tiny", num_classes=2, layers=1, **TINY), "lv_adapter", names=["a"])
