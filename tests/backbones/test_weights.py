"""Pretrained weights from every kind of file, and one clear error for each way they cannot be had."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from segvit.backbones.vit import plain_vit
from segvit.backbones.weights import load_weights, read_state, unwrap
from segvit.contracts import UserError

TINY = {"num_classes": 0, "depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64}


def trunk(name: str = "vit_tiny_patch16_224", *, seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model(name, **(TINY | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_same(model: nn.Module, state: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_safetensors(tmp_path: Path) -> None:
    source, model = trunk(), trunk(seed=2)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    load_weights(model, str(tmp_path / "vit.safetensors"))
    assert_same(model, source.state_dict())


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_files_with_the_wrappers_of_frameworks(wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    source, model = trunk(), trunk(seed=2)
    state: dict[str, Any] = {prefix + key: value for key, value in source.state_dict().items()}
    state |= {prefix + "head.weight": torch.zeros(10, 64), prefix + "head.bias": torch.zeros(10)}  # a classifier
    torch.save({wrapper: state, "epoch": 3, "args": {"lr": 0.1}} if wrapper else state, tmp_path / "vit.pth")
    load_weights(model, str(tmp_path / "vit.pth"))
    assert_same(model, source.state_dict())


def jax_layout(state: dict[str, Tensor], heads: int, depth: int, prefix: str = "") -> dict[str, Any]:
    """AugReg's names and axis orders for a timm state dict."""
    dim = state["cls_token"].shape[-1]
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": torch.zeros(dim, 10), "head/bias": torch.zeros(10),
    }  # fmt: skip
    for i in range(depth):
        theirs, ours = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        attention = theirs + "MultiHeadDotProductAttention_1/"
        weights, biases = state[ours + "attn.qkv.weight"].chunk(3), state[ours + "attn.qkv.bias"].chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{name}/kernel"] = weight.mT.unflatten(1, (heads, -1))
            arrays[f"{attention}{name}/bias"] = bias.unflatten(0, (heads, -1))
        arrays[attention + "out/kernel"] = state[ours + "attn.proj.weight"].mT.unflatten(0, (heads, -1))
        arrays[attention + "out/bias"] = state[ours + "attn.proj.bias"]
        for number, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{theirs}LayerNorm_{number}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}LayerNorm_{number}/bias"] = state[f"{ours}{norm}.bias"]
        for number in (0, 1):
            arrays[f"{theirs}MlpBlock_3/Dense_{number}/kernel"] = state[f"{ours}mlp.fc{number + 1}.weight"].mT
            arrays[f"{theirs}MlpBlock_3/Dense_{number}/bias"] = state[f"{ours}mlp.fc{number + 1}.bias"]
    return {prefix + key: value.contiguous().numpy() for key, value in arrays.items()}


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_npz_of_augreg(prefix: str, tmp_path: Path) -> None:
    source, model = trunk(), trunk(seed=2)
    np.savez(tmp_path / "vit.npz", **jax_layout(source.state_dict(), heads=2, depth=2, prefix=prefix))
    load_weights(model, str(tmp_path / "vit.npz"))
    assert_same(model, source.state_dict())


def resized(positions: Tensor, grid: tuple[int, int], head: int = 1, mode: str = "bicubic") -> Tensor:
    side = round((positions.shape[1] - head) ** 0.5)
    maps = positions[:, head:].mT.unflatten(2, (side, side))
    maps = F.interpolate(maps, size=grid, mode=mode, align_corners=False, antialias=False)
    return torch.cat([positions[:, :head], maps.flatten(2).mT], dim=1)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_another_image_size_resizes_positions_bicubic_without_antialias(suffix: str, tmp_path: Path) -> None:
    source = trunk(img_size=96).state_dict()
    path = tmp_path / f"vit.{suffix}"
    if suffix == "npz":
        np.savez(path, **jax_layout(source, heads=2, depth=2))
    else:
        save_file(source, path)
    for size in ((48, 64), (128, 128), (96, 96)):
        model = trunk(seed=2, img_size=size)
        load_weights(model, str(path))
        expected = resized(source["pos_embed"], (size[0] // 16, size[1] // 16))
        torch.testing.assert_close(model.pos_embed.data, expected)
        assert_same(model, source | {"pos_embed": model.pos_embed.data})
        load_weights(model, str(path), position_mode="bilinear")
        bilinear = resized(source["pos_embed"], (size[0] // 16, size[1] // 16), mode="bilinear")
        torch.testing.assert_close(model.pos_embed.data, bilinear)


@pytest.mark.parametrize("registers", [False, True])
def test_official_keys_of_dinov2(registers: bool, tmp_path: Path) -> None:
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    source = trunk(name, img_size=70).state_dict()
    official = dict(source) | {"mask_token": torch.zeros(1, 64)}
    if registers:  # the official file has a position for the class token and none for registers
        position = torch.randn(1, 1, 64)
        official["register_tokens"] = official.pop("reg_token")
        official["cls_token"] = source["cls_token"] - position
        official["pos_embed"] = torch.cat([position, source["pos_embed"]], dim=1)
    torch.save(official, tmp_path / "dinov2.pth")
    model = trunk(name, seed=2, img_size=70)
    load_weights(model, str(tmp_path / "dinov2.pth"))
    torch.testing.assert_close(dict(model.state_dict()), dict(source))


@pytest.mark.parametrize(
    "name",
    ["beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224", "deit3_small_patch16_224"],
)
def test_other_families_by_their_timm_keys(name: str, tmp_path: Path) -> None:
    size = 70 if "patch14" in name else 64
    source, model = trunk(name, img_size=size), trunk(name, seed=2, img_size=size)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    load_weights(model, str(tmp_path / "vit.safetensors"))
    assert_same(model, source.state_dict())


def test_plain_vit_loads_weights(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    model = plain_vit("vit_tiny_patch16_224", image_size=32, out_indices=[0], weights=str(tmp_path / "vit.safetensors"))
    assert_same(model, source.state_dict())


def test_hub_names_offline() -> None:
    for name in ("vit_tiny_patch16_224.augreg_in21k", "someone/some-vit"):
        with pytest.raises(UserError, match=r"neither a local file nor .*weights=PATH") as caught:
            load_weights(trunk(), name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("vit_tiny_patch16_224.made_up", "timm/vit_tiny_patch16_224.made_up"),
        ("someone/some-vit", "someone/some-vit"),
        ("hf-hub:someone/some-vit", "someone/some-vit"),
    ],
)
def test_hub_names_from_the_cache(name: str, repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = trunk(), trunk(seed=2)
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    save_file(source.state_dict(), folder / "snapshots" / revision / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    load_weights(model, name)
    assert_same(model, source.state_dict())


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "npz"])
def test_missing_file(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*no such weights file"):
        load_weights(trunk(), str(tmp_path / f"nowhere.{suffix}"))


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "npz"])
@pytest.mark.parametrize("damage", ["short", "empty", "text"])
def test_damaged_file(suffix: str, damage: str, tmp_path: Path) -> None:
    path, state = tmp_path / f"vit.{suffix}", trunk().state_dict()
    if suffix == "safetensors":
        save_file(state, path)
    elif suffix == "pth":
        torch.save(state, path)
    else:
        np.savez(path, **jax_layout(state, heads=2, depth=2))
    whole = path.read_bytes()
    path.write_bytes({"short": whole[: len(whole) // 2], "empty": b"", "text": b"<html>404: not found</html>"}[damage])
    with pytest.raises(UserError, match="damaged") as caught:
        load_weights(trunk(), str(path))
    assert str(path) in str(caught.value)


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("plain", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(plain: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "bomb.pth", tmp_path / "harm"
    content = {"model": trunk().state_dict(), "extra": Bomb(target)}
    if plain:
        path.write_bytes(pickle.dumps({"extra": Bomb(target)}, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match="refused"):
        load_weights(trunk(), str(path))
    assert not target.exists()


def test_objects_in_an_archive_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "harm"
    arrays = {"embedding/kernel": np.array([Bomb(target)], dtype=object)}
    np.savez(tmp_path / "bomb.npz", **arrays)
    with pytest.raises(UserError, match="damaged"):
        load_weights(trunk(), str(tmp_path / "bomb.npz"))
    assert not target.exists()


def test_no_state_dict(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        read_state(tmp_path / "list.pth")
    with pytest.raises(UserError, match="no tensors"):
        unwrap({"epoch": 3})


@pytest.mark.parametrize("change", [{"depth": 3}, {"depth": 1}, {"embed_dim": 96, "num_heads": 3}])
def test_another_architecture(change: dict[str, int], tmp_path: Path) -> None:
    state = trunk().state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=r"does not fit VisionTransformer.*choose the matching backbone"):
        load_weights(trunk(**change), str(tmp_path / "vit.safetensors"))
    np.savez(tmp_path / "vit.npz", **jax_layout(state, heads=2, depth=2))
    if change != {"depth": 1}:
        with pytest.raises(UserError, match=r"does not fit VisionTransformer.*choose the matching backbone"):
            load_weights(trunk(**change), str(tmp_path / "vit.npz"))


def test_another_family(tmp_path: Path) -> None:
    save_file(trunk().state_dict(), tmp_path / "vit.safetensors")
    np.savez(tmp_path / "vit.npz", **jax_layout(trunk().state_dict(), heads=2, depth=2))
    for name in ("beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"):
        for suffix in ("safetensors", "npz"):
            with pytest.raises(UserError, match="fit"):
                load_weights(trunk(name), str(tmp_path / f"vit.{suffix}"))


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_rgb_weights_for_other_channel_counts(suffix: str, tmp_path: Path) -> None:
    source = trunk().state_dict()
    path = tmp_path / f"vit.{suffix}"
    if suffix == "npz":
        np.savez(path, **jax_layout(source, heads=2, depth=2))
    else:
        save_file(source, path)
    red, green, blue = source["patch_embed.proj.weight"].split(1, dim=1)
    for channels, kernel in (
        (1, red + green + blue),
        (3, source["patch_embed.proj.weight"]),
        (5, torch.cat([red, green, blue, red, green], dim=1) * 3 / 5),
    ):
        model = trunk(seed=2, in_chans=channels)
        load_weights(model, str(path), needed=list(model.parameters()))
        torch.testing.assert_close(model.patch_embed.proj.weight.data, kernel)
        assert_same(model, source | {"patch_embed.proj.weight": model.patch_embed.proj.weight.data})


def test_a_gray_image_gives_the_tokens_of_its_rgb_copy(tmp_path: Path) -> None:
    save_file(trunk().state_dict(), tmp_path / "vit.safetensors")
    gray, color = trunk(seed=2, in_chans=1), trunk(seed=3)
    for model in (gray, color):
        load_weights(model, str(tmp_path / "vit.safetensors"))
    image = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(gray.patch_embed(image), color.patch_embed(image.expand(-1, 3, -1, -1)))


def test_weights_of_another_channel_count_that_is_not_rgb_do_not_fit(tmp_path: Path) -> None:
    save_file(trunk(in_chans=4).state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=r"1 of another shape .*patch_embed"):
        load_weights(trunk(in_chans=5), str(tmp_path / "vit.safetensors"))
    model = trunk(in_chans=4)
    load_weights(model, str(tmp_path / "vit.safetensors"))
