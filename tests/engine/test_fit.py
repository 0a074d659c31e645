"""The loop: accumulation, clipping, NaN, averaging, precision and what is reported."""

import copy
import math
from contextlib import suppress

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segvit.contracts import Batch, UserError
from segvit.engine.fit import Procedure, Progress, fit
from segvit.engine.freeze import freeze
from segvit.engine.optim import make_optimizer, parameter_rates
from segvit.engine.settings import Optim, Schedule
from segvit.zoo import create_model, find_system

CLASSES = 4
SYSTEMS = {
    "segvit_vit_tiny": {"out_indices": [0, 1], "layers": 1, "dropout": 0.0, "drop_path": 0.0},
    "segmenter_vit_tiny": {"layers": 1, "dropout": 0.0, "drop_path": 0.0},
}


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, step_scheduler_with_optimizer=False)


def tiny(name="segvit_vit_tiny"):
    torch.manual_seed(0)
    options = {"image_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, **SYSTEMS[name]}
    return create_model(name, num_classes=CLASSES, **options)


def batches(steps, images, *, seed=0):
    """Batches with blocks of classes, one image all ignored and others partly."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        masks = torch.randint(0, CLASSES, (images, 4, 4), generator=generator).repeat_interleave(8, 1)
        masks = masks.repeat_interleave(8, 2).to(torch.uint8)
        masks[0] = 255
        masks[1, :, :20] = 255
        yield Batch(torch.randn(images, 3, 32, 32, generator=generator), masks, [f"{step}_{i}" for i in range(images)])


def parted(whole, count):
    for batch in whole:
        size = len(batch.images) // count
        cuts = [slice(i * size, (i + 1) * size) for i in range(count)]
        yield [Batch(batch.images[cut], batch.masks[cut], batch.names[cut]) for cut in cuts]


def run(
    model, parts, accelerator, *, steps, name="segvit_vit_tiny", clip=None, lr=1e-3, optim="adamw", average=None,
    loss=None, start=0, after=lambda step: None,
):  # fmt: skip
    """Train; returns the reported rows."""
    system, rows = find_system(name), []
    settings = Optim(name=optim, lr=lr, weight_decay=0.0, lr_mult={}, decay_mult={})
    optimizer = make_optimizer(parameter_rates(model.named_parameters(), settings), settings)
    model, optimizer = accelerator.prepare(model, optimizer)

    def criterion(out, masks, totals):
        losses = system.criterion(out, masks, totals, ignore_index=255)
        return losses if loss is None else loss(losses)

    procedure = Procedure(
        criterion=criterion, normalisers=lambda masks: system.normalisers(masks, num_classes=CLASSES, ignore_index=255),
        schedule=Schedule(kind="constant", warmup=0), steps=steps, clip=clip,
    )  # fmt: skip
    progress = Progress(step=start)
    fit(
        model, optimizer, parts, procedure=procedure, accelerator=accelerator, progress=progress, average=average,
        report=rows.append, after=after,
    )  # fmt: skip
    assert progress.step == steps
    return rows


@pytest.mark.parametrize("name", SYSTEMS)
def test_accumulation_equals_one_big_batch(name, accelerator):
    models, histories = [], []
    for count in (1, 2, 4):
        model = tiny(name)
        rows = run(model, parted(batches(3, 8), count), accelerator, steps=3, name=name, optim="sgd", clip=1.0, lr=0.1)
        models.append(model.state_dict())
        histories.append(rows)
    for state, rows in zip(models[1:], histories[1:], strict=True):
        for ours, expected in zip(rows, histories[0], strict=True):
            assert ours.keys() == expected.keys()
            for key in ours.keys() - {"seconds"}:
                assert ours[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), key
        for key, value in models[0].items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: key + text)
    assert any(not torch.equal(value, tiny(name).state_dict()[key]) for key, value in models[0].items())


def test_rows_hold_the_loss_its_terms_the_rate_and_the_norm(accelerator):
    rows = run(tiny(), parted(batches(2, 4), 1), accelerator, steps=2)
    assert [row["step"] for row in rows] == [1, 2]
    terms = [key for key in rows[0] if key.startswith("loss_")]
    assert len(terms) >= 3
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[term] for term in terms))
        assert row["lr"] == row["lr_max"] == 1e-3
        assert row["grad_norm"] > 0
        assert row["seconds"] > 0


def test_gradients_are_clipped_to_the_norm(accelerator):
    before = tiny()
    moved = {}
    for clip in (None, 0.01):
        model = tiny()
        rows = run(model, parted(batches(1, 4), 1), accelerator, steps=1, optim="sgd", lr=1.0, clip=clip)
        pairs = zip(model.parameters(), before.parameters(), strict=True)
        moved[clip] = torch.cat([(a - b).detach().flatten() for a, b in pairs]).norm().item()
    assert rows[0]["grad_norm"] > 0.1  # what is reported is the norm before
    assert moved[None] == pytest.approx(rows[0]["grad_norm"], rel=1e-4)
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_files(value, accelerator):
    model, calls, seen = tiny(), [], []

    def loss(losses):
        calls.append(1)
        return losses if len(calls) < 6 else losses | {"loss_dice": losses["loss_dice"] * value}

    with pytest.raises(UserError) as caught:
        run(model, parted(batches(5, 4), 2), accelerator, steps=5, loss=loss, after=seen.append)
    message = str(caught.value)
    assert f"the loss is {value} at step 3 (loss_dice)" in message
    assert "2_2, 2_3" in message  # the second half of the third batch
    assert "2_0" not in message
    assert seen == [1, 2]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_batch_of_nothing_but_ignore_has_a_finite_loss(accelerator):
    batch = next(batches(1, 2))
    batch.masks[:] = 255
    rows = run(tiny(), iter([[batch]]), accelerator, steps=1)
    assert rows[0]["loss"] == rows[0]["loss"] < 1e6


def test_the_average_follows_the_weights(accelerator):
    model = tiny()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    states = []
    run(
        model, parted(batches(3, 4), 1), accelerator, steps=3, average=average,
        after=lambda step: states.append(copy.deepcopy(model.state_dict())),
    )  # fmt: skip
    expected = states[0]
    for state in states[1:]:
        expected = {key: 0.9 * expected[key] + 0.1 * state[key] for key in state}
    found = average.module.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    assert any(not torch.equal(found[key], value) for key, value in model.state_dict().items())


def test_a_run_goes_on_from_its_step(accelerator):
    rows = run(tiny(), parted(batches(2, 4), 1), accelerator, steps=5, start=3)
    assert [row["step"] for row in rows] == [4, 5]


def test_frozen_parameters_stay(accelerator):
    model = tiny()
    model.backbone.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with suppress(StopIteration):
        run(model, parted(batches(2, 4), 1), accelerator, steps=2)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert not any(key.startswith("backbone.") for key in changed)


def half(precision):
    """An accelerator that scales the loss on the CPU, where accelerate itself does not."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, step_scheduler_with_optimizer=False)
    if precision == "fp16":
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    return accelerator


def test_an_overflow_of_fp16_leaves_out_the_step_and_halves_the_scale():
    accelerator, model, seen, states = half("fp16"), tiny(), [], []
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    parameter = model.head.queries
    parameter.register_hook(lambda gradient: gradient * (float("inf") if len(seen) == 1 else 1.0))

    def after(step):
        seen.append(accelerator.scaler.get_scale())
        states.append(copy.deepcopy([model.state_dict(), average.module.state_dict()]))

    rows = run(model, parted(batches(3, 4), 1), accelerator, steps=3, clip=1.0, average=average, after=after)
    assert seen == [16.0, 8.0, 8.0]
    assert [math.isfinite(row["grad_norm"]) for row in rows] == [True, False, True]
    (first, first_average), (second, second_average), (third, _) = states
    assert all(torch.equal(second[key], first[key]) for key in first)
    assert all(torch.equal(second_average[key], first_average[key]) for key in first)
    assert any(not torch.equal(third[key], second[key]) for key in first)


def test_the_reported_norm_is_that_of_the_unscaled_gradients(accelerator):
    plain, scaled = tiny(), tiny()
    expected = run(plain, parted(batches(2, 4), 2), accelerator, steps=2, clip=1.0)
    found = run(scaled, parted(batches(2, 4), 2), half("fp16"), steps=2, clip=1.0)
    # The network itself runs in fp16 here.
    assert [row["grad_norm"] for row in found] == pytest.approx([row["grad_norm"] for row in expected], rel=0.05)


@pytest.mark.parametrize("name", SYSTEMS)
def test_losses_are_taken_in_fp32(name):
    accelerator, seen = half("bf16"), []

    def loss(losses):
        seen.append((torch.is_autocast_enabled("cpu"), {value.dtype for value in losses.values()}))
        return losses

    run(tiny(name), parted(batches(1, 4), 1), accelerator, steps=1, name=name, loss=loss)
    assert seen == [(False, {torch.float32})]


def test_frozen_norms_stay_still():
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    torch.manual_seed(0)
    name = "setr_naive_vit_tiny"
    model = create_model(name, num_classes=CLASSES, image_size=32, patch_size=8, depth=2, embed_dim=64,
                         out_indices=[0, 1], width=32)  # fmt: skip
    freeze(model, [r"aux_heads\."])
    before = copy.deepcopy(model.state_dict())
    run(model, parted(batches(1, 4), 1), accelerator, steps=1, name=name)
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"backbone", "head"}
