"""Towers as open_clip makes them, by name and at their real sizes, through the four systems; random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from segvit.backbones.vit import PlainViT
from segvit.zoo import build_network
from tests.text.clips import openai_state

NAMES = ("cat", "traffic light", "sea")
SYSTEMS = {  # the options that say where CLIP comes from, and small sizes of all else
    "zegclip_vit_base": ("backbone", "weights", {"image_size": 224, "prompts": 2, "templates": "name"}),
    "denseclip_resnet50": ("clip", "weights", {"image_size": 224, "decoder_layers": 1, "fpn_dim": 16, "head_dim": 16}),
    "zsseg_resnet50": ("clip", "text_weights", {"backbone": "resnet18", "layers": 1, "templates": "name"}),
    "dpt_clip_vit_base": ("clip", "weights", {"template": "name"}),
}
RESNETS = ("denseclip_resnet50", "zsseg_resnet50")  # that take CLIP's ResNets too


def reference(name: str) -> Any:
    torch.manual_seed(0)
    clip = open_clip.create_model(name, pretrained=None).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() == 1:  # biases and norms, which start from 0 and 1
                parameter.add_(0.05 * torch.randn_like(parameter))
    return clip


def written(clip: Any, folder: Path, layout: str) -> str:
    """The weights in a file; OpenAI's is in half precision, which `clip` is rounded to."""
    if layout == "open_clip":
        save_file({key: value.contiguous() for key, value in clip.state_dict().items()}, folder / "clip.safetensors")
        return str(folder / "clip.safetensors")
    state = openai_state(clip)
    torch.save(state, folder / "clip.pt")
    clip.load_state_dict({key: state[key].to(value.dtype) for key, value in clip.state_dict().items()})
    return str(folder / "clip.pt")


def image_vector(model: Any, images: Tensor) -> Tensor:
    """CLIP's vector of the image, without what the system adds to the tower."""
    regions = dict(model.named_children()).get("regions")
    tower = model.image if "dpt" in type(model).__module__ else model.backbone if regions is None else regions.tower
    if isinstance(tower, PlainViT):
        tower.gaps, tower.doubled_class = nn.ModuleDict(), False
        tower.embedding = dict(tower.embedding.named_children()).get("joint", tower.embedding)  # type: ignore[union-attr]
    vector = tower(images).pooled
    assert isinstance(vector, Tensor)
    return vector


def word_vectors(model: Any) -> Tensor:
    """The unit vectors of the bare names."""
    buffers = dict(model.named_buffers())
    if "class_embeddings" in buffers:
        return buffers["class_embeddings"]
    if "general" in buffers:
        return buffers["general"]
    words = model.prompting.words
    return F.normalize(words.tower(words.get_buffer("tokens")), dim=-1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [
    ("ViT-B-32-quickgelu", "openai"), ("ViT-B-32-quickgelu", "open_clip"), ("ViT-B-32", "open_clip"),
    ("RN50-quickgelu", "openai"),
])  # fmt: skip
@torch.no_grad()
def test_real_towers_run_through_every_system(name: str, layout: str, tmp_path: Path) -> None:
    clip = reference(name)
    path, images = written(clip, tmp_path, layout), torch.randn(1, 3, 224, 224)
    image = clip.encode_image(images)
    words = clip.encode_text(open_clip.tokenize(list(NAMES)), normalize=True)
    assert image.abs().max() > 0.1
    for system in SYSTEMS if name.startswith("ViT") else RESNETS:
        which, weights, options = SYSTEMS[system]
        model: Any = build_network(
            system, num_classes=3, class_names=NAMES, **(options | {which: name, weights: path})
        ).eval()
        assert model(images).logits.shape[:2] == (1, 3)
        torch.testing.assert_close(word_vectors(model), words, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(image_vector(model, images), image, rtol=1e-3, atol=1e-4)
