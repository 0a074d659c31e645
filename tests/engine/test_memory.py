"""The footprint of a training step: what is counted, that it grows by one image at a time, and what it leaves alone."""

import dataclasses

import pytest
import torch
from torch import nn

from segvit.contracts import Batch, UserError
from segvit.engine.memory import (
    Footprint,
    amount,
    footprint,
    free_memory,
    is_out_of_memory,
    largest_batch,
    peak_bytes,
    probe_sizes,
)
from segvit.engine.settings import Optim
from segvit.zoo import create_model, find_system

CPU = torch.device("cpu")
CLASSES = 4
OPTIONS = {"image_size": 64, "patch_size": 8, "depth": 3, "embed_dim": 64, "layers": 1, "drop_path": 0.1}
NEED = Footprint(weights=100, state=300, constant=50, image=10)


def tiny(name="segvit_vit_tiny", **options):
    torch.manual_seed(0)
    indices = {"out_indices": [0, 2]} if name.startswith("segvit") else {}
    return create_model(name, num_classes=CLASSES, **OPTIONS | indices | options)


def measured(model, name="segvit_vit_tiny", *, precision="fp32", optim=Optim(), average=False, most=None):
    system = find_system(name)
    masks = torch.arange(CLASSES).repeat_interleave(16 * 64).reshape(1, 64, 64).to(torch.uint8)
    return footprint(
        model, Batch(torch.ones(1, 3, 64, 64), masks, ["a"]), optim=optim, average=average, precision=precision,
        criterion=lambda out, masks, totals: system.criterion(out, masks, totals, ignore_index=255),
        normalisers=lambda masks: system.normalisers(masks, num_classes=CLASSES, ignore_index=255), most=most,
    )  # fmt: skip


def test_the_peak_of_live_bytes_is_that_of_the_operations():
    kept = torch.ones(1000)

    def run():
        first = kept * 2  # 4000 bytes
        second = (first + 1).view(10, 100)  # a view adds nothing
        first.mul_(3)  # nor does work in place
        del first
        third = second.double()  # 8000 bytes, when the first 4000 are gone
        del second, third
        kept.add_(1)

    assert peak_bytes(run, CPU, [kept]) == 12000


def test_the_peak_of_a_backward_pass_is_seen():
    weight = nn.Parameter(torch.ones(100))
    weight.grad = torch.zeros(100)

    def run():
        (weight.exp().exp()).sum().backward()

    assert 800 <= peak_bytes(run, CPU, [weight, weight.grad]) <= 2000


@pytest.mark.parametrize("name", ["segvit_vit_tiny", "segmenter_vit_tiny"])
def test_two_small_batches_tell_what_a_large_one_takes(name):
    model = tiny(name)
    found = measured(model, name)
    batch = Batch(torch.randn(8, 3, 64, 64), torch.randint(0, CLASSES, (8, 64, 64), dtype=torch.uint8), [])
    batch.masks[:, :4, :1] = torch.arange(CLASSES, dtype=torch.uint8)[:, None]  # all classes, as where it was measured
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step():
        system = find_system(name)
        totals = system.normalisers(batch.masks, num_classes=CLASSES, ignore_index=255)
        images, masks = batch.images.clone(), batch.masks.clone()
        torch.stack(list(system.criterion(model(images), masks, totals).values())).sum().backward()

    resident = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    eight = peak_bytes(step, CPU, resident)
    assert found.constant + 8 * found.image == pytest.approx(eight, rel=0.03)


def test_weights_gradients_moments_and_average_are_counted():
    model = tiny()
    model.backbone.requires_grad_(False)
    weights = sum(4 * tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    trained = sum(4 * tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    assert measured(model).weights == weights
    assert measured(model).state == 3 * trained
    assert measured(model, average=True).state == 3 * trained + weights
    assert measured(model, optim=Optim(name="sgd")).state == 2 * trained
    assert measured(model, optim=Optim(name="sgd", momentum=0.0)).state == trained


def test_checkpointing_freezing_and_half_precision_are_in_the_measure():
    plain = measured(tiny()).image
    assert measured(tiny(checkpointing=True)).image < 0.8 * plain
    assert measured(tiny(), precision="bf16").image < 0.95 * plain
    frozen = tiny()
    frozen.backbone.requires_grad_(False)
    assert measured(frozen).image < 0.8 * plain


def test_measuring_leaves_no_trace():
    model = create_model("setr_naive_vit_tiny", num_classes=CLASSES, image_size=64, patch_size=8, depth=2, embed_dim=64,
                         out_indices=[0, 1], width=32)  # fmt: skip
    model.eval()
    model.head.train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    found = measured(model, "setr_naive_vit_tiny")
    assert found.image > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # statistics too
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert [p.grad is not None for p in model.parameters()].count(True) == 1
    assert (next(model.parameters()).grad == 1).all()


def test_how_many_images_are_measured():
    plain, normed = nn.Linear(1, 1), nn.Sequential(nn.BatchNorm2d(1))
    assert [probe_sizes(plain, most) for most in (None, 1, 2, 8)] == [[1, 2], [1], [1, 2], [1, 2]]
    assert [probe_sizes(normed, most) for most in (None, 1, 2, 8)] == [[2, 3], [1], [2], [2, 3]]
    assert measured(tiny(), most=1).image == pytest.approx(measured(tiny()).image, rel=0.1)


def test_sums_and_shares():
    assert (NEED.total(4), NEED.coming(4)) == (490, 390)
    assert NEED.sharded(2) == dataclasses.replace(NEED, weights=50, state=150)
    assert NEED.text(4) == (
        "0.00049 MB (weights 0.0001 MB, gradients and optimiser 0.0003 MB, activations 1e-05 MB for each of 4 images)"
    )
    assert [amount(size) for size in (34.2e6, 999e6, 1.24e9, 31.4e9)] == ["34.2 MB", "999 MB", "1.2 GB", "31 GB"]


@pytest.mark.parametrize(
    ("free", "parts", "most", "size"),
    [
        (1000, 1, 64, 44),  # (800 - 350) / 10 = 45 images, one less to be even
        (1000, 3, 999, 132),  # 44 a micro-batch: 45 would be an odd total
        (1000, 2, 999, 90),
        (1000, 1, 7, 6),
        (1000, 1, 1, 1),
        (1000, 8, 4, 8),  # a multiple of the parts, even above the most
        (463, 1, 64, 2),
        (451, 1, 64, 1),
    ],
)
def test_the_largest_batch(free, parts, most, size):
    assert largest_batch(NEED, free, parts=parts, most=most) == size


def test_not_even_one_image():
    with pytest.raises(UserError, match=r"not even one image fits: .* use a smaller model or a smaller augment.crop"):
        largest_batch(NEED, 449, parts=1)


def test_free_memory_is_known_here():
    assert free_memory(CPU) is None or free_memory(CPU) > 1e6


def test_what_running_out_of_memory_looks_like():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(UserError("can't allocate memory"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_is_that_of_a_real_step_on_a_gpu(precision):
    model = tiny(image_size=256, embed_dim=192, depth=6, out_indices=[0, 5]).cuda()
    found = measured(model, precision=precision)
    system, device = find_system("segvit_vit_tiny"), torch.device("cuda")
    images = torch.randn(16, 3, 64, 64, device=device)
    masks = torch.arange(CLASSES, device=device).repeat_interleave(16 * 64).reshape(1, 64, 64).repeat(16, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    before = torch.cuda.memory_allocated() - found.weights
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        totals = system.normalisers(masks, num_classes=CLASSES, ignore_index=255)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            out = model(images)
        torch.stack(list(system.criterion(out, masks, totals).values())).sum().backward()
        optimizer.step()
    assert found.total(16) == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.2)
