from __future__ import annotations

import pytest
import torch
from torch import Tensor

from segvit.adapters.cavpt import PromptGenerator, TextPrompts, VisualPrompts, run_with
from segvit.backbones.clip import clip_vit
from segvit.backbones.vit import PlainViT
from segvit.contracts import UserError
from segvit.text.architecture import TextConfig, VisionConfig
from segvit.text.tokenize import word_pieces
from segvit.text.tower import TextTower

NAMES = ["cat", "hair_drier", "tv monitor"]


@pytest.fixture(scope="module")
def tower() -> TextTower:
    torch.manual_seed(0)
    return TextTower(TextConfig(width=16, layers=1, heads=2, embed_dim=8)).eval()


@pytest.fixture
def vit() -> PlainViT:
    torch.manual_seed(0)
    config = VisionConfig(width=16, layers=3, heads=2, embed_dim=8, image_size=32, patch_size=8)
    return clip_vit(config, image_size=(32, 32)).eval()


def written_out(prompts: TextPrompts, position: str) -> list[Tensor]:
    """The sentences put together part by part."""
    sentences = []
    for number, name in enumerate(NAMES):
        context = prompts.context[number] if prompts.context.ndim == 3 else prompts.context
        size, half = len(word_pieces(name.replace("_", " "))), len(context) // 2
        word, rest = prompts.rest[number, :size], prompts.rest[number, size:]
        parts = {
            "front": [word, context],
            "middle": [context[:half], word, context[half:]],
            "end": [context, word],
        }[position]
        sentences.append(torch.cat([prompts.start[number], *parts, rest]))
    return sentences


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", ["front", "middle", "end"])
def test_positions_of_the_name(tower, position, class_specific):
    prompts = TextPrompts(tower, NAMES, context=5, position=position, class_specific=class_specific)
    sentences = torch.stack(written_out(prompts, position))
    assert torch.equal(prompts.embeddings(), sentences)
    ends = prompts.tokens.argmax(-1)
    assert torch.allclose(prompts(tower), tower.encode(sentences, ends), atol=1e-6)  # all 77 tokens
    prompts(tower).sum().backward()
    assert prompts.context.grad.abs().sum(-1).gt(0).all()
    assert prompts.context.shape == ((3, 5, 16) if class_specific else (5, 16))


def test_contexts_of_classes_start_apart(tower):
    context = TextPrompts(tower, NAMES, context=4, class_specific=True).context
    assert not torch.equal(context[0], context[1])


@pytest.mark.parametrize("class_specific", [False, True])
def test_context_starts_from_words(tower, class_specific):
    prompts = TextPrompts(tower, NAMES, context="a photo of a", class_specific=class_specific)
    tokens = torch.tensor(word_pieces("a photo of a"))
    assert torch.equal(prompts.context, tower.embed(tokens).expand_as(prompts.context))
    assert torch.equal(prompts.embeddings(), tower.embed(prompts.tokens))


def test_text_errors(tower):
    with pytest.raises(UserError, match="0 context vectors"):
        TextPrompts(tower, NAMES, context=0)
    with pytest.raises(UserError, match="0 classes"):
        TextPrompts(tower, [])
    with pytest.raises(UserError, match="front, middle, end"):
        TextPrompts(tower, NAMES, position="back")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="word pieces"):
        TextPrompts(tower, NAMES, context=80)


@pytest.mark.parametrize(("bottom_limit", "millions"), [(12, 1.204992), (8, 5.656320), (1, 13.446144)])
def test_parameter_counts_of_the_card(bottom_limit, millions):
    with torch.device("meta"):
        prompts = VisualPrompts(12, 768, 512, num_classes=100, bottom_limit=bottom_limit)
    assert sum(p.numel() for p in prompts.parameters()) == round(1e6 * millions)


def test_generator_learns_texts_but_not_tokens():
    torch.manual_seed(0)
    generator = PromptGenerator(2, 16, 8, num_classes=5, key_dim=4, extra_keys=3)
    tokens, text = torch.randn(2, 7, 16, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    out = generator(1, tokens, text)
    assert (out.prompts.shape, out.logits.shape, out.attention.shape) == ((2, 4, 16), (2, 4, 5), (2, 4, 10))
    (out.prompts.square().sum() + out.logits.square().sum()).backward()
    assert tokens.grad is None
    assert text.grad is not None
    assert generator.extra.grad[0].eq(0).all()
    assert generator.extra.grad[1].ne(0).any()


def test_order_of_prompts_does_not_matter(vit):
    step, prompts = vit.embed(torch.randn(2, 3, 32, 48)), torch.randn(2, 5, 16)
    ours = run_with(vit, 0, step, prompts)
    official = vit.blocks[0](torch.cat([step.tokens, prompts], dim=1))[:, :-5]
    assert torch.allclose(ours.tokens, official, atol=1e-5)
    assert (ours.prefix, ours.grid) == (1, (4, 6))


def test_no_prompts_leave_clip_alone(vit):
    images, text = torch.randn(2, 3, 32, 32), torch.randn(2, 2, 8)
    prompts = VisualPrompts(3, 16, 8, num_classes=5, bottom_limit=4, length=0)
    features, logits = prompts(vit, vit.embed(images), text)
    assert logits == []
    assert list(prompts.parameters()) == []
    assert torch.equal(features.pooled, vit(images).pooled)
    assert torch.equal(features.maps[0], vit(images).maps[0])


@pytest.mark.parametrize("bottom_limit", [1, 2, 3, 4])
def test_every_prompt_has_an_effect(vit, bottom_limit):
    prompts = VisualPrompts(3, 16, 8, num_classes=5, bottom_limit=bottom_limit, length=2, extra_keys=3)
    vit.requires_grad_(False)
    features, logits = prompts(vit, vit.embed(torch.randn(2, 3, 32, 32)), torch.randn(2, 4, 8))
    assert len(logits) == 4 - bottom_limit
    sum((values.square().sum() for values in [*logits, features.pooled]), torch.zeros(())).backward()
    assert all(p.grad is not None and p.grad.ne(0).any() for p in prompts.parameters())


@pytest.mark.parametrize("bottom_limit", [0, 5])
def test_bottom_limit_outside(bottom_limit):
    with pytest.raises(UserError, match="choose 1 to 4"):
        VisualPrompts(3, 16, 8, num_classes=5, bottom_limit=bottom_limit)
