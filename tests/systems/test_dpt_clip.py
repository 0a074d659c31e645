from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from segvit.backbones.clip import ClipResNet, Towers, clip_towers, clip_vit
from segvit.contracts import Classes, UserError
from segvit.model_folder import load_model, match_classes, save_model
from segvit.systems import dpt_clip
from segvit.systems.dpt_clip import DualPromptClip, criterion, losses, normalisers
from segvit.tasks import classify
from segvit.text.architecture import TextConfig, VisionConfig
from segvit.text.embeddings import class_embeddings
from segvit.text.tower import TextTower
from segvit.zoo import build_network, create_model
from tests.tasks.test_classify import run, write_folder

NAMES = ["cat", "hair_drier", "sea", "tv monitor"]


def build(names=NAMES, **options) -> DualPromptClip:
    torch.manual_seed(0)
    vit = clip_vit(
        VisionConfig(width=16, layers=3, heads=2, embed_dim=8, image_size=32, patch_size=8), image_size=(32, 32)
    )
    text = TextTower(TextConfig(width=16, layers=1, heads=2, embed_dim=8))
    options = {"context": 3, "length": 2, "class_prompts": 2, "bottom_limit": 2} | options
    return DualPromptClip(Towers(vit, text, math.log(10)), names, **options).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def test_logits_by_definition(images):
    model = build(template="{} texture.")
    out = model.outputs(images)
    words = model.text_prompts(model.text)
    plain = model.image(images).pooled
    general = class_embeddings(
        model.text, [name.replace("_", " ") for name in NAMES], templates=("{} texture.",), cache=False
    )
    assert torch.allclose(model.general, general)
    assert torch.allclose(out.text_logits, 10 * F.cosine_similarity(plain[:, None], words, dim=-1), atol=1e-5)
    zero_shot = F.cosine_similarity(plain[:, None], general, dim=-1)
    assert torch.equal(out.selected, zero_shot.argsort(descending=True)[:, :2])
    features, _ = model.visual_prompts(model.image, model.image.embed(images), words[out.selected])
    assert torch.allclose(out.logits, 10 * F.cosine_similarity(features.pooled[:, None], words, dim=-1), atol=1e-5)
    expected = 10 * F.cosine_similarity(features.pooled[:, None], general, dim=-1)
    assert torch.allclose(out.image_logits, expected, atol=1e-5)
    assert out.class_logits.shape == (3, 2, 2, 4)


def test_no_more_prompts_than_classes(images):
    assert build(class_prompts=10).outputs(images).selected.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 3


def test_without_class_aware_prompts(images):
    out = build(bottom_limit=4).outputs(images)
    assert out.class_logits.shape == (3, 0, 2, 4)
    assert "loss_class" not in losses(out, torch.tensor([0, 1, 2]), epoch=0)


def test_only_prompts_train(images):
    model = build()
    training = {id(p) for group in dpt_clip.parameter_groups(model) for p in group["params"]}
    assert training == {id(p) for p in model.parameters() if p.requires_grad}
    out = model.outputs(images)
    torch.stack(list(losses(out, out.selected[:, 0], epoch=0).values())).sum().backward()
    assert all((p.grad is not None) == (id(p) in training) for p in model.parameters())


def test_phases_of_the_loss(images):
    out = build().outputs(images)
    labels = out.selected[:, 0]
    early, late = losses(out, labels, epoch=29), losses(out, labels, epoch=30)
    assert set(early) == {"loss_text", "loss_image", "loss", "loss_class"}
    assert set(late) == {"loss", "loss_class"}
    assert torch.allclose(early["loss"], 0.1 * late["loss"])
    assert torch.equal(early["loss_text"], F.cross_entropy(out.text_logits, labels))
    assert torch.equal(early["loss_image"], F.cross_entropy(out.image_logits, labels))


def test_auxiliary_loss_is_over_prompts_of_the_true_class(images):
    out = build().outputs(images)
    unselected = next(k for k in range(4) if k not in out.selected[2].tolist())
    labels = torch.tensor([int(out.selected[0, 1]), int(out.selected[1, 0]), unselected])
    values = [
        F.cross_entropy(out.class_logits[image, layer, slot], labels[image])
        for image, slot in ((0, 1), (1, 0)) for layer in range(2)
    ]  # fmt: skip
    term = losses(out, labels, epoch=30, class_weight=0.5)["loss_class"]
    assert torch.allclose(term, 0.5 * torch.stack(values).mean())
    assert set(losses(out._replace(selected=out.selected + 4), labels, epoch=30)) == {"loss"}


def test_dense_logits(images):
    model = build()
    scores = model.dense_logits(images)
    assert scores.shape == (3, 4, 4, 6)
    coded = model.encode(images)
    cell = F.cosine_similarity(coded.features.extras["dense"][0, :, 2, 5], coded.texts, dim=-1)
    assert torch.allclose(scores[0, :, 2, 5], 10 * cell, atol=1e-5)


def official(model: DualPromptClip) -> dict[str, torch.Tensor]:
    generator = "image_encoder.transformer.extractor."
    return {
        "prompt_learner.ctx": model.text_prompts.context + 1, "prompt_learner.token_prefix": model.text_prompts.start,
        "prompt_learner.token_suffix": model.text_prompts.rest, "text_features": model.general,
        f"{generator}classfiers.1.weight": torch.ones(4, 16), f"{generator}lns2.0.bias": torch.ones(16),
        "image_encoder.proj.proj": torch.ones(16, 8), "zeroshot_clip_image_encoder.proj": torch.zeros(16, 8),
        "image_encoder.transformer.ctx_learner.ctx": torch.zeros(0, 2, 16),
    }  # fmt: skip


def test_convert():
    model = build()
    state = dpt_clip.convert(official(model))
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    assert len(state) == 7
    assert model.image.embedding.proj.weight.eq(1).all()
    assert model.visual_prompts.generator.layers[1].classify.weight.eq(1).all()
    assert model.visual_prompts.generator.layers[0].norm.bias.eq(1).all()


def test_convert_for_new_classes(images):
    other = build(["dog", "road"])
    state = dpt_clip.convert(official(build()), new_classes=True)
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(other.text_prompts.context, state["text_prompts.context"])
    assert other.outputs(images).logits.shape == (3, 2)


def test_errors():
    config = VisionConfig(width=8, layers=(1, 1, 1, 1), heads=4, embed_dim=8, image_size=32)
    text = TextTower(TextConfig(width=16, layers=1, heads=2, embed_dim=8))
    with pytest.raises(UserError, match="ViT"):
        DualPromptClip(Towers(ClipResNet(config, image_size=(32, 32)), text, 0.0), NAMES)
    with pytest.raises(UserError, match="class_prompts is 0"):
        build(class_prompts=0)
    with pytest.raises(UserError, match="names two classes"):
        build(["tv monitor", "tv_monitor"])


TOWERS = {
    "embed_dim": 8, "vision": {"width": 16, "layers": 2, "heads": 2, "patch_size": 8, "image_size": 32},
    "text": {"width": 16, "layers": 1, "heads": 2}, "context": 3, "length": 2,
}  # fmt: skip


def test_the_phase_follows_from_the_steps(images):
    model, labels = build(general_steps=2).train(), torch.tensor([0, 1, 2])
    totals, found = normalisers(labels), []
    for _ in range(3):
        out = model(images)
        found.append(criterion(out, labels, totals))
        parts = losses(model.outputs(images), labels, epoch=len(found) - 1, general_epochs=2)
        torch.testing.assert_close(torch.stack(list(found[-1].values())).sum(), torch.stack(list(parts.values())).sum())
    assert ["loss_text" in terms for terms in found] == [True, True, False]
    assert not torch.equal(found[2]["loss_both"], criterion(out, labels, totals, label_smoothing=0.2)["loss_both"])
    assert "loss_text" not in criterion(model.eval()(images), labels, totals)
    assert model.steps == 3


def test_it_is_a_classifier_of_the_catalogue(images, tmp_path):
    classes = Classes(tuple(NAMES), ((0, 0, 0),) * 4)
    torch.manual_seed(0)
    model = create_model("dpt_clip_vit_base", classes=classes, **TOWERS).eval()
    assert model(images).logits.shape == (3, 4, 1, 1)
    assert model.spec.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    model.text_prompts.context.data += 1
    save_model(model, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model")(images).logits, model(images).logits)
    fewer = create_model("dpt_clip_vit_base", classes=Classes(("sea", "dog"), ((0, 0, 0),) * 2), **TOWERS).eval()
    match_classes(fewer, model)
    assert torch.equal(fewer.text_prompts.context, model.text_prompts.context)
    assert torch.equal(fewer.text_prompts.rest[0], model.text_prompts.rest[2])


def test_classification_from_a_folder(tmp_path):
    data = write_folder(tmp_path / "images", train=3, val=2, names=("bars", "disc", "plain"))
    changes = {"model": "dpt_clip_vit_base", "options": TOWERS | {"general_steps": 2}}
    found = classify.train_classifier(run(data, tmp_path / "run", **changes))
    assert found["images"] == 6
    model = load_model(tmp_path / "run")
    assert model.steps == 4
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert ["loss_image" in row for row in rows] == [True, True, False, False]
    rows = classify.classify_files(str(data / "val" / "disc"), str(tmp_path / "run"), top=3, done=lambda *_: None)
    assert {one["class"] for one in rows[0]["classes"]} == {"bars", "disc", "plain"}


@pytest.mark.parametrize(("classes", "millions"), [(100, 1.213184), (1000, 1.904384)])
def test_trained_parameters_of_the_card(classes, millions):
    """1.213 M and 1.904 M with class-aware prompts in the last block; nobody published multiply-adds."""
    with torch.device("meta"):
        model = build_network("dpt_clip_vit_base", num_classes=classes)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == round(1e6 * millions)


@pytest.mark.parametrize(("clip", "millions", "image"), [("ViT-B-16", 149.62, 86.19), ("RN50", 102.01, 38.32)])
def test_parameters_of_clip_s_towers(clip, millions, image):
    with torch.device("meta"):
        towers = clip_towers(f"{clip}-quickgelu")
    counts = [sum(p.numel() for p in tower.parameters()) / 1e6 for tower in (towers.image, towers.text)]
    assert counts[0] == pytest.approx(image, abs=0.006)
    assert sum(counts) + 1e-6 == pytest.approx(millions, abs=0.006)
