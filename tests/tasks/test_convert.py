"""Official checkpoints of ZegCLIP and zsseg, which hold no class vectors, become model folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segvit import cli
from segvit.contracts import UserError
from segvit.model_folder import load_model
from segvit.systems import zegclip
from segvit.tasks.convert import Words, convert_checkpoint
from segvit.text.embeddings import class_embeddings
from segvit.text.prompt import LearnedPrompt
from segvit.text.tower import text_tower
from segvit.zoo import create_model
from tests.golden.run import load_case
from tests.text.clips import clip_file, tiny_clip

NAMES = ("cat", "street_lamp", "tree")
CASE = Path(__file__).parents[1] / "golden" / "zegclip__end_to_end"
ZEGCLIP: dict[str, Any] = {
    "patch_size": 8, "depth": 3, "embed_dim": 32, "joint_dim": 16, "prompts": 3, "heads": 4, "unseen": [2],
}  # fmt: skip
ZSSEG: dict[str, Any] = {
    "backbone": "resnet18", "embed_dim": 16, "vision": {"width": 64, "layers": 1, "heads": 1, "image_size": 32},
    "dim": 64, "mask_dim": 16, "queries": 6, "layers": 2, "heads": 2, "hidden": 32, "embed_hidden": 32,
    "region_size": 32, "unseen": [1],
}  # fmt: skip


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("names") / "classes.txt"
    path.write_text("\n".join(NAMES))
    return str(path)


def images() -> Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def text_state() -> dict[str, Tensor]:
    """The tiny text tower under OpenAI's names."""
    return {key: value for key, value in tiny_clip().state_dict().items() if not key.startswith("visual.")}


def as_official(
    model: Any, shapes: dict[str, Tensor], convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:  # fmt: skip
    """A model's weights under official names: numbered elements sent through `convert` say where each one goes."""
    count, numbered = 0, {}
    for key, value in shapes.items():
        numbered[key] = torch.arange(count, count + value.numel()).view(value.shape)
        count += value.numel()
    flat, own = torch.zeros(count), model.state_dict()
    for key, places in convert(numbered).items():
        flat[places.flatten()] = own[key].float().flatten()
    return {key: flat[places.flatten()].view(places.shape) for key, places in numbered.items()}


def zegclip_checkpoint(path: Path, *, text: bool = True) -> Any:
    """An official file of a random ZegCLIP, and that model; its keys and shapes are those of the golden case."""
    torch.manual_seed(0)
    model = create_model("zegclip_vit_base", num_classes=3, image_size=32, **ZEGCLIP).eval()
    weights = load_case(CASE).weights
    shapes = {key: value for key, value in weights.items() if not key.startswith("text_encoder.")}
    state = as_official(model, shapes, zegclip.convert)
    if text:
        state |= {f"text_encoder.{key}": value for key, value in text_state().items() if key != "logit_scale"}
    torch.save({"state_dict": state, "meta": {}}, path)
    return model


def same_outputs(folder: Path, model: Any) -> None:
    loaded = load_model(folder)
    assert loaded.classes.names == NAMES
    with torch.no_grad():
        expected, found = model(images()), loaded(images())
    torch.testing.assert_close(found.logits, expected.logits)
    assert torch.equal(found.extras["seen"], expected.extras["seen"])


def test_zegclip_by_its_own_text_tower(tmp_path: Path, names: str) -> None:
    model = zegclip_checkpoint(tmp_path / "official.pth")
    convert_checkpoint(
        str(tmp_path / "official.pth"), "zegclip_vit_base", str(tmp_path / "out"), num_classes=None, classes=names,
        image_size=None, options=ZEGCLIP,
    )  # fmt: skip
    tower = text_tower(None, weights=str(clip_file(tmp_path / "clip.safetensors")))
    plain = [name.replace("_", " ") for name in NAMES]
    model.set_classes(class_embeddings(tower, plain, templates="a photo of a {}", cache=False), unseen=[2])
    same_outputs(tmp_path / "out", model)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_zegclip_by_a_file_of_vectors(tmp_path: Path, names: str, suffix: str) -> None:
    """As the official repository ships them, in half precision."""
    model, path = zegclip_checkpoint(tmp_path / "official.pth", text=False), tmp_path / f"vectors{suffix}"
    vectors = torch.randn(3, 16).half()
    if suffix == ".npy":
        np.save(path, vectors.numpy())
    else:
        np.savez(path, vectors.numpy())
    options = [f"--options.{key}={value}" for key, value in ZEGCLIP.items()]
    cli.main(["models", "convert", str(tmp_path / "official.pth"), "--model", "zegclip_vit_base", "--classes", names,
              "--vectors", str(path), "--out", str(tmp_path / "out"), *options])  # fmt: skip
    model.set_classes(F.normalize(vectors.float(), dim=-1), unseen=[2])
    same_outputs(tmp_path / "out", model)


def test_zegclip_without_any_source_of_vectors(tmp_path: Path, names: str) -> None:
    zegclip_checkpoint(tmp_path / "official.pth", text=False)

    def convert(**changes: Any) -> None:
        given = {"num_classes": None, "classes": names, "image_size": None, "options": ZEGCLIP} | changes
        convert_checkpoint(str(tmp_path / "official.pth"), "zegclip_vit_base", str(tmp_path / "out"), **given)

    with pytest.raises(UserError, match="no text tower to make class vectors with; give --text_weights"):
        convert()
    with pytest.raises(UserError, match="no class vectors; give --classes FILE"):
        convert(num_classes=3, classes=None)
    np.save(tmp_path / "other.npy", np.ones((4, 16), np.float32))
    with pytest.raises(UserError, match=r"give one table \(3, 16\)"):
        convert(words=Words(vectors=str(tmp_path / "other.npy")))
    np.save(tmp_path / "odd.npy", np.array([{}]))
    with pytest.raises(UserError, match="cannot be read as class vectors"):
        convert(words=Words(vectors=str(tmp_path / "odd.npy")))
    assert not (tmp_path / "out").exists()


def zsseg_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names of a zsseg with a plain ResNet as detectron2 and the official code have them."""
    theirs = {}
    for key, value in state.items():
        name = key
        if name.startswith("backbone.network."):
            name = name.replace("backbone.network.", "backbone.")
            for ours, other in (("conv1.", "stem.conv1."), ("bn1.", "stem.conv1.norm.")):
                name = (
                    f"backbone.{other}" + name.removeprefix(f"backbone.{ours}")
                    if name.startswith(f"backbone.{ours}")
                    else name
                )
            for stage in range(1, 5):
                name = name.replace(f"layer{stage}.", f"res{stage + 1}.")
            name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
            for number in (1, 2):
                name = name.replace(f".bn{number}.", f".conv{number}.norm.")
        elif name.startswith("pixel_decoder."):
            name = name.replace("pixel_decoder.masks.", "pixel_decoder.mask_features.")
            for level in range(4):
                name = name.replace(f"lateral.{level}.", f"adapter_{level + 1}.").replace(
                    f"output.{level}.", f"layer_{level + 1}."
                )
            name = "sem_seg_head." + name.replace("_1.0.", "_1.").replace("_2.0.", "_2.").replace(
                "_3.0.", "_3."
            ).replace("_4.0.", "_4.")
            for level in range(1, 5):
                name = name.replace(f"_{level}.1.", f"_{level}.norm.")
        elif name == "decoder.queries":
            name = "sem_seg_head.predictor.query_embed.weight"
        elif name.startswith(("decoder.layers.", "decoder.norm.")):
            name = name.replace("decoder.", "sem_seg_head.predictor.transformer.decoder.", 1)
            name = (
                name.replace(".cross_attn.", ".multihead_attn.")
                .replace(".fc1.", ".linear1.")
                .replace(".fc2.", ".linear2.")
            )
        elif name.startswith("decoder."):
            name = f"sem_seg_head.predictor.{name.removeprefix('decoder.')}"
        elif name == "no_object":
            name = "clip_adapter.non_object_embedding"
        theirs[name] = value
    return theirs


def zsseg_checkpoint(path: Path, *, learned: bool) -> tuple[Any, dict[str, Tensor]]:
    """An official file of a random zsseg whose regions have an adapter of their own, and that model."""
    torch.manual_seed(0)
    model: Any = create_model("zsseg_resnet50", num_classes=3, **ZSSEG).eval()
    own = model.state_dict()
    tower = {
        key.removeprefix("regions.tower."): value for key, value in own.items() if key.startswith("regions.tower.")
    }
    rest = {
        k: v
        for k, v in own.items()
        if not k.startswith("regions.") and k not in ("class_embeddings", "region_embeddings", "seen")
    }
    state = {key: value for key, value in zsseg_names(rest).items() if not key.endswith("num_batches_tracked")}
    official = {
        "class_embedding": tower.pop("cls_token")[0, 0], "positional_embedding": tower.pop("pos_embed")[0],
        "proj": tower.pop("embedding.proj.weight").T,
    }  # fmt: skip
    pairs = (
        ("embedding.norm.", "ln_post."), ("norm_pre.", "ln_pre."), ("patch_embed.proj.", "conv1."),
        ("blocks.", "transformer.resblocks."), (".norm1.", ".ln_1."), (".norm2.", ".ln_2."),
        (".attn.qkv.", ".attn.in_proj_"), (".attn.proj.", ".attn.out_proj."), (".mlp.fc1.", ".mlp.c_fc."),
        (".mlp.fc2.", ".mlp.c_proj."),
    )  # fmt: skip
    for key, value in tower.items():
        name = key
        for ours, other in pairs:
            name = name.replace(ours, other)
        official[name] = value
    for adapter in ("clip_adapter", "_region_clip_adapter"):
        state |= {f"{adapter}.clip_model.visual.{key}": value for key, value in official.items()}
        state |= {f"{adapter}.clip_model.{key}": value for key, value in text_state().items()}
    if learned:
        state |= {"_region_clip_adapter.prompt_learner.prefix_prompt": 0.1 * torch.randn(4, 64)}
        state |= {"_region_clip_adapter.prompt_learner.start_signal": torch.zeros(1, 64)}
    torch.save(
        {"model": state | {"criterion.empty_weight": torch.ones(4), "clip_adapter.pixel_mean": torch.ones(3, 1, 1)}},
        path,
    )
    return model, state


@pytest.mark.parametrize("learned", [False, True])
def test_zsseg_by_its_own_text_towers(tmp_path: Path, names: str, learned: bool) -> None:
    model, state = zsseg_checkpoint(tmp_path / "official.pth", learned=learned)
    convert_checkpoint(
        str(tmp_path / "official.pth"), "zsseg_resnet50", str(tmp_path / "out"), num_classes=None, classes=names,
        image_size=None, options=ZSSEG,
    )  # fmt: skip
    tower = text_tower(None, weights=str(clip_file(tmp_path / "clip.safetensors")))
    written = regions = class_embeddings(tower, NAMES, templates="a sculpture of a {}.", cache=False)
    if learned:
        prompt = LearnedPrompt(64, prefix=4)
        prompt.prefix.data = state["_region_clip_adapter.prompt_learner.prefix_prompt"]
        regions = prompt(tower, NAMES).detach()
        assert not torch.allclose(regions, written, atol=1e-3)
    model.set_classes(written, unseen=[1], regions=regions)
    same_outputs(tmp_path / "out", model)
