"""FRPT: sizes of the card, what the prompt and the gate do, frozen parts, official keys, Recall@K of a folder."""

import numpy as np
import pytest
import torch
from PIL import Image

from segvit.backbones.pyramid import pyramid
from segvit.contracts import UserError
from segvit.data.image_folder import open_image_folder
from segvit.metrics.retrieval import recall_at_k
from segvit.systems.frpt import (
    FRPT,
    ParsingPrompt,
    SaliencySampler,
    StyleGate,
    convert,
    criterion,
    frpt,
    gaussian,
    normalisers,
    paper_head,
    released_head,
    sampling_grid,
    shallow_map,
)
from segvit.zoo import MODELS, RETRIEVERS, create_model, find_system


def small(form: str, classes: int = 3) -> FRPT:
    torch.manual_seed(0)
    return frpt(num_classes=classes, form=form, backbone="resnet10t", size=64 if form == "released" else None)


def trained(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: ParsingPrompt(256), 246_016),
        (lambda: SaliencySampler(1024), 4_746),
        (lambda: StyleGate(2048), 1_048_576),
        (lambda: paper_head(2048), 1_048_576),
        (lambda: paper_head(2048, bottleneck_dim=384), 2_621_440),
        (lambda: paper_head(2048, reduction=16, bottleneck_dim=512), 2_621_440),
        (lambda: released_head(2048), 29_366_272),
    ],
)
def test_sizes_are_those_of_the_card(build, count):
    with torch.device("meta"):
        assert trained(build()) == count


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 246_016 + 1_048_576 + 2049 * 100),
        ({"bottleneck_dim": 384}, 246_016 + 2_621_440 + 2049 * 100),
        ({"form": "released"}, 4_746 + 29_366_272 + 2048 + 2048 * 100),
    ],
)
def test_prompt_head_and_classifier_train_and_nothing_else(options, count):
    with torch.device("meta"):
        assert trained(frpt(num_classes=100, **options)) == count


@pytest.mark.parametrize(
    ("name", "backbone", "count"),
    [
        ("frpt_resnet50", 23_508_032, 246_016 + 1_048_576 + 2049 * 100),
        ("frpt_resnet101", 42_500_160, 246_016 + 1_048_576 + 2049 * 100),
        ("frpt_released_resnet50", 23_508_032, 4_746 + 29_366_272 + 2048 + 2048 * 100),
        ("frpt_released_resnet101", 42_500_160, 4_746 + 29_366_272 + 2048 + 2048 * 100),
    ],
)
def test_the_catalogue_has_them_apart_from_the_dense_models(name, backbone, count):
    assert RETRIEVERS.keys().isdisjoint(MODELS)
    assert find_system(name).task == "retrieve"
    with torch.device("meta"):
        model = create_model(name, num_classes=100)
    assert trained(model) == count
    assert sum(parameter.numel() for parameter in model.backbone.parameters()) == backbone


@pytest.mark.parametrize("size", [(9, 9), (7, 12)])
def test_even_attention_leaves_the_image_as_it_is(size):
    images = torch.rand(1, 3, 4 * size[0], 4 * size[1])
    prompt = ParsingPrompt(2, kernel=5)  # starts even
    with torch.no_grad():
        grid = sampling_grid(torch.ones(1, 1, *size), *gaussian((3, 4), (2.0, 3.0)))
        sampled, places, attention = prompt(images, torch.rand(1, 2, *size))
    x, y = torch.linspace(-1, 1, size[1]), torch.linspace(-1, 1, size[0])
    expected = torch.stack([x.expand(size), y[:, None].expand(size)])
    assert torch.allclose(grid[0], expected, atol=1e-5)
    assert sampled.shape == images.shape
    assert places.shape == (1, *images.shape[-2:], 2)
    assert torch.allclose(attention, torch.tensor(1 / (size[0] * size[1])))
    assert places[0, 2 * size[0], 2 * size[1]].abs().max() < 0.2  # the middle stays in the middle


def test_the_prompt_magnifies_what_has_attention():
    attention = torch.full((1, 1, 31, 31), 0.1)
    attention[..., 10:14, 20:24] = 30.0
    column, row = gaussian((30, 30), (13, 13))
    grid = sampling_grid(attention, column * row)
    even = sampling_grid(torch.ones(1, 1, 31, 31), column * row)
    place = torch.tensor([2 * 21.5 / 30 - 1, 2 * 11.5 / 30 - 1])[:, None, None]
    near = ((grid[0] - place).abs() < 0.15).all(0).sum()
    assert near > 3 * ((even[0] - place).abs() < 0.15).all(0).sum()
    assert torch.allclose(grid, sampling_grid(attention, column, row), atol=1e-4)


def test_places_keep_their_precision_under_autocast():
    attention = torch.rand(1, 1, 31, 31, generator=torch.Generator().manual_seed(0))
    column, row = gaussian((30, 30), (13, 13))
    exact = sampling_grid(attention, column * row)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sampling_grid(attention, column * row), exact)


def test_an_open_gate_keeps_the_map_and_a_shut_one_normalises_it():
    gate, x = StyleGate(8), 3 + 2 * torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        for layer in (gate.attention[0], gate.attention[2]):
            layer.weight.fill_(100.0)
        assert torch.allclose(gate(x), x)
        gate.attention[2].weight.fill_(-100.0)
        shut = gate(x)
    assert shut.mean((2, 3)).abs().max() < 1e-5
    assert torch.allclose(shut.std((2, 3), correction=0), torch.ones(2, 8), atol=1e-3)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_training_moves_all_but_the_backbone(form):
    model, images, labels = small(form), torch.rand(3, 3, 70, 93), torch.tensor([0, 1, 2])
    model.train()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
    losses = []
    for _ in range(4):
        out = model(images)
        loss = criterion(out, labels, normalisers(labels))["loss_class"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert out.logits.shape == (3, 3, 1, 1)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.prompt.parse.parameters() if p.ndim > 1)
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    sides = (64, 64) if form == "released" else (70, 93)
    assert out.extras["sampled"].shape == (3, 3, *sides)


@pytest.mark.parametrize("backbone", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_the_prompt_reads_the_cells_over_the_image(backbone):
    network, images = pyramid(backbone).eval(), torch.rand(1, 3, 70, 93)
    with torch.no_grad():
        expected = network(images).maps[2][..., :5, :6]
        assert torch.equal(shallow_map(network, images, 3), expected)


def test_smoothing_goes_to_the_other_classes_alone():
    model = small("paper", classes=4).eval()
    labels = torch.tensor([2, 0])
    with torch.no_grad():
        out = model(torch.rand(2, 3, 64, 64))
        loss = criterion(out, labels, normalisers(labels), label_smoothing=0.3)["loss_class"]
    target = torch.full((2, 4), 0.1).scatter(1, labels[:, None], 0.7)
    expected = -(target * out.logits.flatten(1).log_softmax(1)).sum(1).mean()
    assert torch.allclose(loss, expected)


def test_official_keys_of_the_whole_network():
    with torch.device("meta"):
        own = frpt(num_classes=5, form="released").state_dict()
    block = [f"retrieval_head.conv_block3.{i}.{name}" for i in (0, 1) for name in (
        "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"
    )]  # fmt: skip
    neck = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    official = [
        "sample.conv_last.weight", "sample.conv_last.bias", "sample.filter.weight", "heads.weight", "pixel_mean",
        "retrieval_head.mam.channel_attention.0.weight", "retrieval_head.mam.channel_attention.2.weight", *block,
        *(f"heads.bottleneck.0.{name}" for name in neck),
        *(name.replace("backbone.network.", "backbone.") for name in own if name.startswith("backbone.")),
    ]  # fmt: skip
    assert set(convert({name: torch.zeros(1) for name in official})) == set(own)


def test_recall_of_a_folder(tmp_path):
    generator = np.random.default_rng(0)
    for label in range(3):
        folder = tmp_path / "test" / f"kind{label}"
        folder.mkdir(parents=True)
        for i in range(3):
            pixels = generator.integers(0, 80, (64, 64, 3), np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(folder / f"{i}.png")
    source = open_image_folder(tmp_path)
    images, labels = zip(*(source.read("test", i) for i in range(9)), strict=True)
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        embeddings = small("paper").eval()(batch).extras["embedding"]
    assert embeddings.shape == (9, 512)
    assert recall_at_k(embeddings.numpy(), np.array(labels), ks=(1, 2)) == {1: 1.0, 2: 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frpt(num_classes=2, form="released", bottleneck_dim=8), "bottleneck_dim is no option"),
        (lambda: frpt(num_classes=2, form="released", kernel=9), "kernel is no option"),
        (lambda: frpt(num_classes=2, size=64), "size is no option"),
        (lambda: ParsingPrompt(4, kernel=6), "kernel is 6"),
        (lambda: SaliencySampler(4, cells=1), "a grid of 1 cells"),
        (lambda: StyleGate(8, 9), "reduction is 9"),
        (lambda: StyleGate(8)(torch.rand(1, 8, 1, 1)), "one cell"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
