"""CAVPT as an adapter: what the parts of the paper give, both phases of the loss, DenseCLIP trained with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.adapters.cavpt import VisualPrompts
from segvit.adapters.class_prompts import cavpt, losses, normalisers
from segvit.backbones.clip import clip_vit
from segvit.backbones.pyramid import pyramid
from segvit.backbones.vit import PlainViT
from segvit.contracts import Dense, UserError
from segvit.model_folder import load_model
from segvit.tasks.dense import train
from segvit.text.architecture import VisionConfig
from segvit.text.embeddings import class_embeddings
from segvit.text.tower import text_tower
from tests.tasks.tiny import experiment
from tests.text.clips import text_file

NAMES = ("cat", "street lamp", "sea", "tree")
DENSECLIP: dict[str, Any] = {
    "embed_dim": 16, "text": {"width": 32, "layers": 1, "heads": 2}, "decoder_dim": 16, "decoder_layers": 1,
    "fpn_dim": 8, "head_dim": 8, "image_size": 32, "vision": {"width": 64, "layers": 4, "heads": 2, "patch_size": 8},
}  # fmt: skip


def vit(embed_dim: int = 16) -> PlainViT:
    torch.manual_seed(0)
    config = VisionConfig(width=32, layers=3, heads=2, embed_dim=embed_dim, image_size=32, patch_size=8)
    return clip_vit(config, image_size=(32, 32)).requires_grad_(False).eval()


def adapted(**options: Any) -> PlainViT:
    network = vit()
    torch.manual_seed(1)
    cavpt(network, class_names=NAMES, text_weights=text_file(), **({"class_prompts": 2} | options))
    return network.eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bottom_limit", [1, 2, 3])
@torch.no_grad()
def test_it_is_the_paper_s_image_side(bottom_limit: int) -> None:
    network, plain = adapted(bottom_limit=bottom_limit, num_prompts=2, extra_keys=3), vit()
    parts: Any = network.gaps["0"].parts
    parts.offsets.normal_()
    words = class_embeddings(text_tower(None, weights=text_file()), NAMES, cache=False)
    torch.testing.assert_close(parts.embeddings, words)
    chosen = (F.normalize(plain(images()).pooled, dim=-1) @ words.T).topk(2).indices
    prompts = VisualPrompts(
        3, 32, 16, num_classes=4, bottom_limit=bottom_limit, length=2, extra_keys=3
    )  # fmt: skip
    prompts.load_state_dict({k: v for k, v in parts.state_dict().items() if k.startswith(("deep", "generator"))})
    expected, logits = prompts(plain, plain.embed(images()), (words + parts.offsets)[chosen])
    found = network(images())
    torch.testing.assert_close(found.pooled, expected.pooled)
    torch.testing.assert_close(found.extras["dense"], expected.extras["dense"])
    assert torch.equal(found.extras["cavpt_classes"], chosen)
    for block, value in enumerate(logits, start=bottom_limit - 1):
        torch.testing.assert_close(found.extras[f"cavpt_logits{block}"], value)


def test_the_first_phase_guides_words_and_prompts() -> None:
    network = adapted(general_steps=2, bottom_limit=2).train()
    masks = torch.randint(0, 4, (2, 32, 48), dtype=torch.uint8)
    masks[0, :9] = 255
    totals, values = normalisers(masks, ignore_index=255), []
    for _ in range(3):
        features = network(images())
        out = Dense(torch.zeros(2, 4, 4, 6), features.extras, features.covers)
        values.append(losses(out, masks, totals, ignore_index=255))
    guides = [
        F.interpolate(out.extras[f"cavpt_guide{i}"], size=(32, 48), mode="bilinear", align_corners=False)
        for i in (0, 1)
    ]  # fmt: skip
    entropy = sum(F.cross_entropy(guide, masks.long(), ignore_index=255) for guide in guides)
    torch.testing.assert_close(values[1]["loss_general"], entropy)
    assert values[2]["loss_general"] == 0
    values[0]["loss_general"].backward()
    parts: Any = network.gaps["0"].parts
    assert parts.offsets.grad.abs().max() > 0
    assert parts.deep.grad.abs().max() > 0
    features = network.eval()(images())
    late = losses(Dense(torch.zeros(2, 4, 4, 6), features.extras, features.covers), masks, totals, ignore_index=255)
    assert list(late) == ["loss_class"]


def test_prompts_are_asked_where_their_class_is() -> None:
    features = adapted(bottom_limit=2)(images())
    classes = features.extras["cavpt_classes"]
    masks = torch.full((2, 32, 48), 255)
    masks[0, 0, 0] = classes[0, 1]
    out = Dense(torch.zeros(2, 4, 4, 6), features.extras, features.covers)
    found = losses(out, masks, normalisers(masks, ignore_index=255), ignore_index=255, class_weight=0.5)["loss_class"]
    asked = [features.extras[f"cavpt_logits{block}"][0, 1] for block in (1, 2)]
    expected = torch.stack([F.cross_entropy(logits, classes[0, 1]) for logits in asked]).mean()
    torch.testing.assert_close(found, 0.5 * expected / 2)  # the second image has nothing to ask for


def test_denseclip_trains_with_it_and_comes_back(tmp_path: Path) -> None:
    options = {"text_weights": text_file(), "class_prompts": 2, "bottom_limit": 3, "general_steps": 2}
    run = experiment(
        tmp_path / "run", model="denseclip_vit_base", options=DENSECLIP, adapter="cavpt", adapter_options=options,
        steps=3, val_every=0,
    )  # fmt: skip
    train(run)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all("loss_general" in row and "loss_class" in row and "loss_score_map" in row for row in rows[:3])
    whole, apart = load_model(tmp_path / "run" / "model"), load_model(tmp_path / "run" / "adapter")
    parts: Any = whole.backbone.gaps["0"].parts  # type: ignore[union-attr]
    assert parts.steps >= 3
    assert parts.offsets.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(apart(images()).logits, whole(images()).logits, rtol=1e-4, atol=1e-5)
    assert apart.config.adapter is not None
    assert apart.config.adapter["options"]["text_weights"] is None


@pytest.mark.parametrize(("options", "message"), [
    ({"bottom_limit": 4}, "choose a block in 1..3"), ({"class_prompts": 0}, "class_prompts 0"),
    ({"text_weights": None}, "cavpt needs the text tower"), ({"num_classes": 5}, "4 entries, but the model has 5"),
])  # fmt: skip
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cavpt(vit(), class_names=NAMES, **({"text_weights": text_file()} | options))


def test_other_towers_are_refused() -> None:
    with pytest.raises(UserError, match="not the joint space"):
        cavpt(vit(embed_dim=8), class_names=NAMES, text_weights=text_file())
    with pytest.raises(UserError, match="needs a plain ViT"):
        cavpt(pyramid("resnet10t"), class_names=NAMES, text_weights=text_file())
