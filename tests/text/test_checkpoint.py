"""Files and tags: every form loads, the quick-GELU trap is closed, and what cannot be had is one line."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from segvit.contracts import UserError
from segvit.text.architecture import clip_config, config_of
from segvit.text.archive import is_script, read_script
from segvit.text.checkpoint import find_clip
from tests.text.clips import clip_file, openai_state, tiny_clip


def script(state: dict[str, torch.Tensor], path: Path) -> Path:
    """A TorchScript archive of a module tree with these tensors."""
    root = nn.Module()
    for key, value in state.items():
        parent = root
        *above, leaf = key.split(".")
        for name in above:
            name = f"n{name}" if name.isdigit() else name  # script refuses numbers outside its own containers
            if name not in dict(parent.named_children()):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.register_buffer(leaf, value)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = root

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Whole(), torch.zeros(1)), path)
    return path


def test_every_form_gives_the_same_tensors(tmp_path: Path) -> None:
    model = tiny_clip()
    expected = model.state_dict()
    torch.save(expected, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in expected.items()}}, tmp_path / "trained.pt")
    renamed = {k if k.startswith("visual.") or k == "logit_scale" else f"text.{k}": v for k, v in expected.items()}
    torch.save(renamed, tmp_path / "custom.pt")
    clip_file(tmp_path / "clip.safetensors")
    for name in ("plain.pt", "trained.pt", "custom.pt", "clip.safetensors"):
        found = find_clip(None, str(tmp_path / name))
        assert found.state is not None
        assert found.state.keys() == expected.keys()
        assert all(torch.equal(found.state[key], value) for key, value in expected.items())
    torch.save(openai_state(model), tmp_path / "openai.pt")
    found = find_clip(None, str(tmp_path / "openai.pt"))
    assert found.state is not None
    assert found.state.keys() == expected.keys()
    assert found.state["ln_final.weight"].dtype == torch.float32


def test_an_archive_is_read_without_running_it(tmp_path: Path) -> None:
    state = {"visual.a.weight": torch.randn(3, 4).half().T, "b.scale": torch.tensor(2.5), "b.ids": torch.arange(3)}
    path = script(state, tmp_path / "jit.pt")
    assert is_script(path)
    found = read_script(path)
    assert set(found) == {f"inner.{key}" for key in state}
    for key, value in state.items():
        assert torch.equal(found[f"inner.{key}"], value)
        assert found[f"inner.{key}"].dtype == value.dtype
    torch.save(state, tmp_path / "plain.pt")
    assert not is_script(tmp_path / "plain.pt")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_an_archive_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Evil()))
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(UserError, match="refused"):
        find_clip(None, str(path))
    torch.save(Evil(), tmp_path / "evil2.pt")
    with pytest.raises(UserError, match="refused"):
        find_clip(None, str(tmp_path / "evil2.pt"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "quick"), [("ViT-B-16", False), ("ViT-B-16-quickgelu", True), ("RN50", False)])
def test_the_name_says_which_gelu(name: str, quick: bool) -> None:
    config = clip_config(name)
    assert config.vision is not None
    assert config.text is not None
    assert (config.vision.quick_gelu, config.text.quick_gelu) == (quick, quick)


def test_openai_s_weights_decide_about_gelu(tmp_path: Path) -> None:
    path = tmp_path / "openai.pt"
    torch.save(openai_state(tiny_clip()), path)
    for given in (None, True):
        assert find_clip("ViT-B-16", str(path), quick_gelu=given).text_config().quick_gelu
    with pytest.raises(UserError, match="contradicts"):
        find_clip("ViT-B-16", str(path), quick_gelu=False)
    other = str(clip_file(tmp_path / "other.safetensors"))
    assert not find_clip("ViT-B-16", other).text_config().quick_gelu
    assert find_clip("ViT-B-16", other, quick_gelu=True).vision.quick_gelu
    assert not find_clip(None, other, quick_gelu=False).vision.quick_gelu


@pytest.mark.parametrize(("model", "quick"), [("ViT-B-16", True), ("ViT-B-16-quickgelu", True)])
def test_tags(model: str, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag of OpenAI's needs quick GELU under both names; one trained with another mean brings it along."""
    import open_clip

    path = clip_file(tmp_path / "clip.safetensors")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(path))
    assert find_clip(model, "openai").text_config().quick_gelu is quick
    assert not find_clip("ViT-B-16", "laion2b_s34b_b88k").text_config().quick_gelu
    assert find_clip("ViT-L-14", "laion2b_s32b_b82k").vision.mean == (0.5, 0.5, 0.5)


def test_offline_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"cannot be downloaded .* copy the checkpoint .* give its path"):
        find_clip("ViT-B-16", "openai")


@pytest.mark.parametrize(("model", "weights", "message"), [
    ("ViT-B-17", None, "did you mean ViT-B-1"), ("ViT-B-16-SigLIP", None, "no CLIP as OpenAI built it"),
    (None, None, "neither a CLIP model nor weights"), (None, "openai", "a tag needs a model"),
    ("ViT-B-16", "opanai", "its tags are openai"), ("ViT-B-16", "gone.pt", "no such file"),
])  # fmt: skip
def test_what_is_wrong_is_named(model: str | None, weights: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_clip(model, weights)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    broken = tmp_path / "x.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        find_clip(None, str(broken))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="no tower of CLIP"):
        find_clip(None, str(tmp_path / "other.pt"))


def test_the_architecture_of_a_file() -> None:
    config = config_of(tiny_clip("rn").state_dict())
    assert config.vision is not None
    assert (config.vision.layers, config.vision.width, config.vision.image_size) == ((1, 2, 1, 1), 8, 64)
    only_text = {key: value for key, value in tiny_clip().state_dict().items() if not key.startswith("visual.")}
    assert config_of(only_text).vision is None
    with_vision = config_of(tiny_clip().state_dict()).vision
    assert with_vision is not None
    assert (with_vision.patch_size, with_vision.heads, with_vision.image_size) == (8, 2, 32)
