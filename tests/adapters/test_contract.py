"""What every tuning method owes the rest of the library, for every name in the catalogue."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from segvit.adapters.catalogue import ADAPTERS
from segvit.adapters.files import CONFIG, TENSORS, save_adapter
from segvit.contracts import UserError
from segvit.model_folder import load_model, save_model
from segvit.tasks.adapters import merge, merge_adapter
from segvit.zoo import adapt, create_model
from tests.text.clips import text_file

K = 3
VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 64}
SYSTEMS: dict[str, dict[str, Any]] = {
    "segvit_vit_tiny": VIT | {"out_indices": [0, 2], "layers": 2},
    "segvit_shrunk_vit_tiny": VIT | {"out_indices": [0, 2], "shrink_at": 1, "layers": 2},
    "segmenter_vit_tiny": VIT | {"layers": 1, "dropout": 0.0},
    "setr_naive_vit_tiny": VIT | {"out_indices": [0, 2], "width": 16},
}
PLAIN = {  # of timm, cut to two blocks: two prefix tokens, one scale a head, rotary positions, relative positions
    "deit_tiny_distilled_patch16_224": {}, "vit_tiny_patch16_224": {}, "eva02_tiny_patch14_224": {"embed_dim": 64},
    "beit_base_patch16_224": {"embed_dim": 64}, "vit_small_patch14_reg4_dinov2": {},
}  # fmt: skip
# The output is the base's until they are trained.
IDENTITY = {"lora", "head_only", "bitfit", "norm_only", "full", "svf", "spm", "pro_tuning", "lv_adapter"}
MERGEABLE = {"ssf", "lora", "svf", "head_only", "bitfit", "norm_only", "full"}
PLAIN_METHODS = sorted(ADAPTERS)


def build(name: str = "segmenter_vit_tiny", **options: Any) -> Any:
    torch.manual_seed(0)
    return create_model(name, num_classes=K, **(SYSTEMS[name] | options)).eval()


def tuned(method: str, name: str = "segmenter_vit_tiny", **options: Any) -> Any:
    model = build(name, **options)
    torch.manual_seed(1)
    adapt(model, method, **needed(method))
    return model.eval()


def needed(method: str) -> dict[str, Any]:
    """The options without which a method cannot be."""
    return {"text_weights": text_file()} if method in ("lv_adapter", "cavpt") else {}


def images(side: int = 40) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))


def shake(model: Any) -> None:
    """As if it had been trained: everything that trains moves a little."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("method", PLAIN_METHODS)
def test_only_the_intended_parameters_train(method: str, name: str) -> None:
    plain = build(name)
    model = tuned(method, name)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    inside = {key.removeprefix("backbone.") for key in trained if key.startswith("backbone.")}
    assert inside == set(model.adapter.trained)
    assert trained - {f"backbone.{key}" for key in inside} == {
        key for key, _ in plain.named_parameters() if not key.startswith("backbone.")
    }
    model.train()
    model(images()).logits.square().mean().backward()
    for key, parameter in model.named_parameters():
        if key not in trained:
            assert parameter.grad is None, key
    reached = [key for key in inside if model.backbone.get_parameter(key).grad is not None]
    assert bool(reached) == (method != "head_only")


@pytest.mark.parametrize("method", PLAIN_METHODS)
def test_untouched_keys_stay_and_detach_puts_the_very_modules_back(method: str) -> None:
    plain = build()
    modules, state = dict(plain.named_modules()), plain.state_dict()
    expected = plain(images()).logits
    adapt(plain, method, **needed(method))
    replaced = [change.path for change in plain.adapter.changes if change.old is not None]
    for key in state:
        if not any(key.startswith(f"backbone.{path}.") for path in replaced):
            assert key in plain.state_dict(), key
    if method in IDENTITY:
        torch.testing.assert_close(plain(images()).logits, expected, rtol=1e-4, atol=1e-5)
    shake(plain)
    assert not torch.allclose(plain(images()).logits, expected)
    plain.backbone.eval()
    backbone = plain.backbone(images()).maps[-1]
    plain.adapter.disable()
    off = plain.backbone(images()).maps[-1]
    plain.adapter.enable()
    torch.testing.assert_close(plain.backbone(images()).maps[-1], backbone, rtol=0, atol=0)
    plain.adapter.detach()
    torch.testing.assert_close(off, plain.backbone(images()).maps[-1], rtol=0, atol=0)
    assert {name: id(module) for name, module in plain.named_modules()} == {n: id(m) for n, m in modules.items()}
    for key, value in state.items():
        if key.startswith("backbone."):
            torch.testing.assert_close(plain.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("method", PLAIN_METHODS)
def test_disabled_is_the_base(method: str) -> None:
    expected = build().backbone(images()).maps[-1]
    model = tuned(method)
    shake(model)
    model.adapter.disable()
    torch.testing.assert_close(model.backbone(images()).maps[-1], expected, rtol=0, atol=0)


@pytest.mark.parametrize("backbone", PLAIN)
@pytest.mark.parametrize("method", PLAIN_METHODS)
def test_every_plain_vit(method: str, backbone: str) -> None:
    torch.manual_seed(0)
    model: Any = create_model(
        "segmenter_linear_vit_base", num_classes=K, backbone=backbone, image_size=32, patch_size=16, depth=2,
        **PLAIN[backbone],
    )  # fmt: skip
    adapt(model, method, **needed(method))
    shake(model)
    out = model.eval()(images(50)).logits
    assert out.isfinite().all()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(images(50)).logits, out, rtol=0, atol=0)
    twin.adapter.disable()
    assert model.adapter.enabled
    if method in MERGEABLE:
        merge(model)
        torch.testing.assert_close(model(images(50)).logits, out, rtol=1e-3, atol=1e-4)
        assert not any("base_layer" in key for key in model.state_dict())


@pytest.mark.parametrize("method", sorted(set(PLAIN_METHODS) - {"full"}))
def test_a_folder_brings_the_model_back(method: str, tmp_path: Path) -> None:
    base = build()
    save_model(base, tmp_path / "base")
    model = load_model(tmp_path / "base")
    adapt(model, method, **needed(method))
    shake(model)
    save_adapter(model, tmp_path / "adapter", base="../base")
    loaded = load_model(tmp_path / "adapter")
    torch.testing.assert_close(loaded(images()).logits, model.eval()(images()).logits, rtol=1e-4, atol=1e-5)
    assert loaded.classes == model.classes
    stored = load_file(tmp_path / "adapter" / TENSORS)
    assert len([key for key in stored if key.startswith("base_model.model.backbone.")]) >= len(model.adapter.names)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    torch.testing.assert_close(again(images()).logits, model(images()).logits, rtol=1e-4, atol=1e-5)
    assert again.adapter.trained == model.adapter.trained


@pytest.mark.parametrize("method", sorted(MERGEABLE & set(PLAIN_METHODS)))
def test_a_merged_folder_is_plain(method: str, tmp_path: Path) -> None:
    model = tuned(method, "segvit_vit_tiny")
    shake(model)
    save_model(model, tmp_path / "model")
    expected = model(images()).logits
    merge_adapter(str(tmp_path / "model"), str(tmp_path / "plain"))
    plain = load_model(tmp_path / "plain")
    assert plain.adapter is None
    assert plain.state_dict().keys() == build("segvit_vit_tiny").state_dict().keys()
    torch.testing.assert_close(plain(images()).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="already"):
        merge_adapter(str(tmp_path / "model"), str(tmp_path / "plain"))
    with pytest.raises(UserError, match="no adapter"):
        merge(plain)


@pytest.mark.parametrize("method", sorted(set(PLAIN_METHODS) - MERGEABLE))
def test_what_cannot_be_merged_says_so(method: str) -> None:
    with pytest.raises(UserError, match="no plain weights can stand for"):
        merge(tuned(method))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter beside its base."""
    save_model(build(), tmp_path / "base")
    model = load_model(tmp_path / "base")
    adapt(model, "lora", rank=2)
    shake(model)
    save_adapter(model, tmp_path / "adapter", base="../base")
    return tmp_path / "adapter"


def test_other_base_weights_are_refused(folder: Path) -> None:
    other = build()
    with torch.no_grad():
        other.backbone.blocks[1].mlp.fc1.weight[0, 0] += 1e-6
    save_model(other, folder.parent / "other")
    with pytest.raises(UserError, match="other base weights"):
        load_model(folder, base=folder.parent / "other")
    load_model(folder, base=folder.parent / "base")
    save_model(build("setr_naive_vit_tiny", depth=2, out_indices=[0, 1]), folder.parent / "short")
    with pytest.raises(UserError, match="another backbone"):
        load_model(folder, base=folder.parent / "short")
    (folder.parent / "base").rename(folder.parent / "elsewhere")
    with pytest.raises(UserError, match="gone"):
        load_model(folder)


@pytest.mark.parametrize("change", ["value", "missing", "unknown", "shape", "probe"])
def test_every_tensor_is_verified(folder: Path, change: str) -> None:
    tensors = load_file(folder / TENSORS)
    key = "base_model.model.backbone.blocks.0.attn.qkv.lora_B.weight"
    if change == "value":
        tensors[key][3, 1] += 1e-6
    elif change == "missing":
        del tensors[key]
    elif change == "unknown":
        tensors[key + "s"] = tensors[key].clone()
    elif change == "shape":
        tensors[key] = tensors[key][:, :1].contiguous()
    else:
        tensors["probe.logits"] += 1
    save_file(tensors, folder / TENSORS)
    with pytest.raises(UserError, match="another output" if change == "probe" else "damaged"):
        load_model(folder)


def test_a_damaged_folder_is_one_line(folder: Path) -> None:
    data = json.loads((folder / CONFIG).read_text())
    del data["method"]
    (folder / CONFIG).write_text(json.dumps(data))
    with pytest.raises(UserError, match="'method' is missing"):
        load_model(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_model(folder)


def test_saving_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter to save"):
        save_adapter(build(), tmp_path, base="x")


def test_names_and_options_are_checked() -> None:
    with pytest.raises(UserError, match="did you mean vpt_deep"):
        adapt(build(), "vpt_dep")
    with pytest.raises(UserError, match="has no option 'prompts'; it has num_prompts"):
        adapt(build(), "vpt_deep", prompts=3)
    with pytest.raises(UserError, match="no backbone"):
        create_model("ddrnet_23_slim", num_classes=2, adapter="ssf")


@pytest.mark.parametrize(("name", "options"), [("unet", {"backbone": "resnet18"}), ("fcn", {})])
def test_encoders_inside_a_foreign_network(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=K, **options)
    save_model(model, tmp_path / "base")
    adapt(model, "ssf")
    shake(model)
    save_adapter(model, tmp_path / "adapter", base="../base")
    out = model.eval()(images(64)).logits
    torch.testing.assert_close(load_model(tmp_path / "adapter")(images(64)).logits, out, rtol=1e-3, atol=1e-4)
    merge(model)
    largest = out.abs().max().item()
    torch.testing.assert_close(model(images(64)).logits, out, rtol=1e-3, atol=1e-3 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow", "ssf", "lora"])
def test_swin_in_a_system(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"target_modules": ["qkv", "reduction"]} if method == "lora" else {}
    model = create_model(
        "semantic_fpn", num_classes=K, backbone="swin_tiny_patch4_window7_224", fpn_dim=16, head_dim=16
    ).eval()
    plain = set(model.state_dict())
    save_model(model, tmp_path / "base")
    adapt(model, method, **options)
    assert plain != set(model.state_dict())
    shake(model)
    save_adapter(model, tmp_path / "adapter", base="../base")
    out = model.eval()(images(70)).logits
    loaded = load_model(tmp_path / "adapter")
    torch.testing.assert_close(loaded(images(70)).logits, out, rtol=1e-3, atol=1e-4)
