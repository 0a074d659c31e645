"""SPM by its behaviour: no effect at first, interim maps, recurrence, the auxiliary loss, the card's budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.adapters.catalogue import LOSSES, attach
from segvit.adapters.spm import HIDDEN, SemanticPromptMatcher, losses, normalisers, spm
from segvit.backbones.pvt import pvt
from segvit.backbones.pyramid import pyramid
from segvit.backbones.vit import plain_vit
from segvit.contracts import Dense, UserError
from segvit.nn.tokens import Step, patch_map
from segvit.tasks.procedure import with_adapter_loss
from segvit.zoo import create_model

K = 3
BACKBONES: dict[str, Any] = {
    "resnet": lambda: pyramid("resnet10t"),
    "convnext": lambda: pyramid("convnext_atto"),
    "swin": lambda: pyramid("swin_tiny_patch4_window7_224", image_size=64),
    "pvt_v2": lambda: pyramid("pvt_v2_b0"),
    "pvt": lambda: pvt("pvt_tiny", dims=(16, 32, 80, 64), depths=(1, 1, 1, 1)),
    "vit": lambda: plain_vit("vit_tiny_patch16_224", image_size=64, depth=4, embed_dim=64, out_indices=[1, 3]),
    "dinov2": lambda: plain_vit("vit_small_patch14_reg4_dinov2", image_size=56, depth=2, out_indices=[1]),
}
TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 64}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return BACKBONES[name]().requires_grad_(False).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def shake(network: Any) -> None:
    torch.manual_seed(2)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize(("name", "width", "options", "millions"), [
    ("resnet50", 64, {}, 0.73), ("resnet101", 128, {}, 1.74), ("resnet50", 64, {"after_last": False}, 0.40),
    ("resnet50", 128, {"after_last": False}, 1.03), ("swin_large_patch4_window7_224", 64, {}, 0.60),
    ("swin_large_patch4_window7_224", 128, {}, 1.49), ("vit_base_patch16_224", 64, {}, 0.63),
    ("vit_base_patch16_224", 128, {}, 1.54),
])  # fmt: skip
def test_the_card_s_budgets(name: str, width: int, options: dict[str, Any], millions: float) -> None:
    """For 150 classes, to the card's two digits behind the point."""
    with torch.device("meta"):
        network = plain_vit(name, out_indices=[11]) if name.startswith("vit") else pyramid(name)
        handle = spm(network, num_classes=150, width=width, **options)
    count = sum(network.get_parameter(key).numel() for key in handle.names)
    assert count == pytest.approx(millions * 1e6, abs=6e3)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_start_is_the_frozen_network_and_only_matchers_train(name: str) -> None:
    network, x = build(name), images()
    keys, before = list(network.state_dict()), network(x)
    handle = spm(network, num_classes=K, carry_hidden=True)
    out = network(x)
    assert all(torch.equal(a, b) for a, b in zip(out.maps, before.maps, strict=True))
    assert (out.strides, out.grid, out.covers) == (before.strides, before.grid, before.covers)
    assert (out.pooled is None) == (before.pooled is None)
    stages = len(handle.changes)
    assert set(out.extras) == {f"spm_map{i}" for i in range(1, stages + 1)}
    assert {key for key, p in network.named_parameters() if p.requires_grad} == set(handle.names)
    shake(network)
    out = network(x)
    assert not torch.allclose(out.maps[-1], before.maps[-1], atol=1e-3)
    sum(m.square().mean() for m in [*out.maps, *out.extras.values()]).backward()  # type: ignore[union-attr]
    assert all(network.get_parameter(key).grad is not None for key in handle.names)
    handle.detach()
    assert list(network.state_dict()) == keys
    again = network(x)
    assert all(torch.equal(a, b) for a, b in zip(again.maps, before.maps, strict=True))
    assert again.extras == {}


@pytest.mark.parametrize("name", ["resnet", "swin", "pvt"])
@torch.no_grad()
def test_a_pyramid_s_map_is_what_the_next_stage_gets(name: str) -> None:
    """Interim maps have the size of their stage, and what a matcher adds reaches the head and the next stage."""
    network, x = build(name), images()
    before = network(x).maps
    handle = spm(network, num_classes=K)
    prompt = torch.nn.init.normal_(network.gaps["2"].prompt.bias)[:, None, None]
    out = network(x)
    sizes = [m.shape[-2:] for m in out.maps]
    assert [m.shape for m in out.extras.values()] == [(2, K, *size) for size in sizes]
    assert torch.equal(out.maps[0], before[0])
    torch.testing.assert_close(out.maps[1], before[1] + prompt)
    assert not torch.allclose(out.maps[2], before[2], atol=1e-3)
    handle.detach()


@torch.no_grad()
def test_tokens_before_the_patches_pass_by() -> None:
    network = build("dinov2")
    spm(network, num_classes=K)
    shake(network)
    step = network.run(0, network.embed(images()))
    out = network.gap(1, step)
    assert step.prefix == 5
    assert torch.equal(out.tokens[:, :5], step.tokens[:, :5])
    assert not torch.allclose(patch_map(out), patch_map(step), atol=1e-3)


def matcher(**options: Any) -> SemanticPromptMatcher:
    torch.manual_seed(0)
    made = SemanticPromptMatcher(
        8, **{"number": 1, "width": 6, "num_classes": K, "steps": 2, "hands_on": True, **options}
    )
    torch.nn.init.normal_(made.prompt.weight)
    return made.requires_grad_(False)


def start(extras: dict[str, Tensor] | None = None) -> Step:
    tokens = torch.randn(2, 1 + 3 * 5, 8, generator=torch.Generator().manual_seed(3))
    return Step(tokens, 1, (3, 5), (3, 5), extras=extras or {})


@torch.no_grad()
def test_the_recurrence_is_a_gru_guided_by_the_semantic_map() -> None:
    """Two steps written out."""
    made, step = matcher(), start()
    out = made(step)
    seen = made.norm(made.reduce(patch_map(step)))
    hidden = seen
    for _ in range(2):
        scores = made.classify(hidden)
        classes = made.embed(F.softmax(scores, dim=1))
        update, reset = torch.sigmoid(made.gates(torch.cat([seen, classes, hidden], 1))).split(6, 1)
        fresh = torch.tanh(made.spread(made.candidate(torch.cat([seen, classes, reset * hidden], 1))))
        hidden = torch.lerp(hidden, fresh, update)
    torch.testing.assert_close(patch_map(out), patch_map(step) + made.prompt(hidden))
    torch.testing.assert_close(out.extras["spm_map1"], scores)
    torch.testing.assert_close(out.extras[HIDDEN], hidden)


@torch.no_grad()
def test_the_semantic_map_and_more_steps_act_on_the_prompt() -> None:
    usual = matcher()(start()).tokens
    assert not torch.allclose(matcher(steps=3)(start()).tokens, usual, atol=1e-3)
    blind = matcher()
    blind.classify.weight.zero_()
    assert not torch.allclose(blind(start()).tokens, usual, atol=1e-3)


@torch.no_grad()
def test_the_state_is_handed_on_and_resized() -> None:
    made = matcher()
    hidden = torch.randn(2, 6, 6, 10)
    given = {HIDDEN: hidden, "other": hidden}
    out = made(start(given))
    resized = F.interpolate(hidden, size=(3, 5), mode="bilinear", align_corners=False)
    torch.testing.assert_close(made(start({HIDDEN: resized})).tokens, out.tokens)
    assert not torch.allclose(made(start()).tokens, out.tokens, atol=1e-3)
    assert given == {HIDDEN: hidden, "other": hidden}  # never changed in place
    assert set(matcher(hands_on=False)(start(given)).extras) == {"other", "spm_map1"}


def example() -> tuple[Dense, Tensor]:
    torch.manual_seed(0)
    maps = {f"spm_map{i}": torch.randn(2, K, 4 // i, 4 // i, requires_grad=True) for i in (1, 2)}
    masks = torch.randint(0, K, (2, 7, 6), dtype=torch.uint8)
    masks[0, :3], masks[1, 5:] = 255, 255
    return Dense(torch.zeros(2, K, 4, 4), maps | {"other": torch.zeros(1)}, (8, 8)), masks


def test_the_loss_is_the_mean_cross_entropy_of_the_interim_maps() -> None:
    out, masks = example()
    found = losses(out, masks, normalisers(masks, ignore_index=255), ignore_index=255)
    expected = []
    for i in (1, 2):
        resized = F.interpolate(out.extras[f"spm_map{i}"], size=(8, 8), mode="bilinear")[..., :7, :6]
        expected.append(F.cross_entropy(resized, masks.long(), ignore_index=255))
    torch.testing.assert_close(found["loss_spm"], 0.4 * torch.stack(expected).mean())
    empty = torch.full_like(masks, 255)
    nothing = losses(out, empty, normalisers(empty, ignore_index=255), ignore_index=255)
    assert nothing["loss_spm"] == 0


def test_parts_of_a_batch_add_up() -> None:
    out, masks = example()
    totals = normalisers(masks, ignore_index=255)
    whole = losses(out, masks, totals, ignore_index=255)["loss_spm"]
    halves = [
        losses(Dense(out.logits[i : i + 1], {k: v[i : i + 1] for k, v in out.extras.items()}, out.covers),
               masks[i : i + 1], totals, ignore_index=255)["loss_spm"]
        for i in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(torch.stack(halves).sum(), whole)


def test_a_run_adds_the_loss_to_the_system_s() -> None:
    out, masks = example()
    criterion, counts = with_adapter_loss(
        lambda out, masks, totals: {"loss": totals["valid"]}, lambda masks: {"valid": torch.tensor(5)},
        LOSSES["spm"], ignore_index=255,
    )  # fmt: skip
    totals = counts(masks)
    assert set(totals) == {"valid", "spm_valid"}
    terms = criterion(out, masks, totals)
    assert terms["loss"] == 5
    assert terms["loss_spm"] > 0


@pytest.mark.parametrize(
    "name", ["segvit_vit_tiny", "segvit_shrunk_vit_tiny", "segmenter_vit_tiny", "setr_pup_vit_tiny"]
)
def test_systems_hand_interim_maps_on(name: str, seeded: torch.Generator) -> None:
    ends = [0, 1, 2, 3] if name.startswith("setr") else [1, 3]
    options = {"out_indices": ends} if not name.startswith("segmenter") else {}
    options |= {"shrink_at": 2} if "shrunk" in name else {}
    model = create_model(name, num_classes=5, **TINY, **options)
    model.eval()
    x = torch.randn(1, 3, 40, 56)
    before = model(x).logits
    attach(model, "spm")  # takes the model's number of classes
    out = model(x)
    torch.testing.assert_close(out.logits, before, rtol=0, atol=0)
    maps = [value for key, value in out.extras.items() if key.startswith("spm")]
    assert [m.shape[:2] for m in maps] == [(1, 5)] * 4
    assert HIDDEN not in out.extras
    assert maps[0].shape[-2:] == (5, 7)
    assert maps[-1].shape[-2:] == ((3, 4) if "shrunk" in name else (5, 7))


def test_the_auxiliary_loss_teaches_the_interim_maps(seeded: torch.Generator) -> None:
    """A few steps of it alone, on a mask that an untrained network can tell from the image."""
    network, x = build("vit"), torch.zeros(2, 3, 64, 64)
    x[..., 32:] = 1
    masks = (x[:, 0] > 0).to(torch.uint8)
    handle = spm(network, num_classes=2, width=16)
    optimizer = torch.optim.AdamW([network.get_parameter(name) for name in handle.names], lr=1e-2)
    found = []
    for _ in range(20):
        features = network(x)
        out = Dense(features.maps[-1], features.extras, features.covers)
        loss = losses(out, masks, normalisers(masks, ignore_index=255), ignore_index=255)["loss_spm"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.3 * found[0]


@pytest.mark.parametrize(("name", "options", "message"), [
    ("vit", {"num_classes": 0}, "positive"), ("vit", {"steps": 0}, "positive"),
    ("dinov2", {"width": 0}, "positive"),
])  # fmt: skip
def test_mistakes(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spm(build(name), **({"num_classes": K} | options))


def test_one_stage_leaves_nothing_without_the_last() -> None:
    with torch.device("meta"), pytest.raises(UserError, match="one stage only"):
        spm(pyramid("resnet18", out_indices=(-1,)), num_classes=K, after_last=False)
