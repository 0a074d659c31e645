"""How much memory a training step takes: measured with one or two images, extrapolated to a batch.

Weights, gradients, optimiser state and average are counted. Activations are measured in a real forward and backward
pass, as the most bytes alive at once: so recomputation (checkpointing), the copies of autocast and the tensors of the
loss are in the figure, which a sum over saved tensors would miss. It grows by the same amount with every image.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segvit.contracts import Batch, UserError
from segvit.data.memory import available_memory
from segvit.engine.settings import Optim
from segvit.engine.state import random_state, restore_random

SHARE = 0.8  # of the free memory that a batch may fill: allocators leave gaps, loaders need some too
LARGEST = 64  # images in a batch that is chosen; beyond, schedules of the recipes no longer fit
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
CPU_ALLOCATOR = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory: you tried to allocate")

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a training step, by what they are for."""

    weights: int  # parameters and buffers
    state: int  # gradients, optimiser state and the average of the weights
    constant: int  # activations whatever the batch, such as half-precision copies of the weights
    image: int  # activations of each image that goes through the network at once

    def total(self, images: int) -> int:
        """All of it for a micro-batch."""
        return self.weights + self.coming(images)

    def coming(self, images: int) -> int:
        """What is still to be allocated once the model is there."""
        return self.state + self.constant + images * self.image

    def sharded(self, processes: int) -> Footprint:
        """The share of each process when weights and state are spread over all of them."""
        return replace(self, weights=self.weights // processes, state=self.state // processes)

    def text(self, images: int) -> str:
        """The figures in words."""
        return (
            f"{amount(self.total(images))} (weights {amount(self.weights)}, gradients and optimiser "
            f"{amount(self.state)}, activations {amount(self.image)} for each of {images} images)"
        )


def footprint(
    model: nn.Module, batch: Batch, *, criterion: Callable[..., dict[str, Tensor]],
    normalisers: Callable[[Tensor], dict[str, Tensor]], precision: Precision, optim: Optim, average: bool,
    most: int | None = None,
) -> Footprint:  # fmt: skip
    """Measure a model in training on its device; weights, buffers, gradients and generators are left as they were.

    `batch` holds one image, which is repeated; at most `most` images go through at once.
    """
    device = next(model.parameters()).device

    def step(images: int) -> None:
        parts = Batch(
            batch.images.repeat(images, 1, 1, 1).to(device), batch.masks.repeat(images, 1, 1).to(device), batch.names
        )
        training_pass(model, parts, criterion=criterion, normalisers=normalisers, precision=precision)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = probe_sizes(model, most)
    with untouched(model):
        # Gradients are there from the start, as in every micro-batch but the first: coming while activations go, those
        # of a large model would hide in the peak of one or two images and not in that of many.
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        resident = [*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)]
        peaks = [peak_bytes(partial(step, size), device, resident) for size in sizes]
    image = peaks[-1] - peaks[0] if len(peaks) > 1 else peaks[0] // sizes[0]
    weights, gradients = stored([*model.parameters(), *model.buffers()]), stored(trained)
    moments = 2 if optim.name == "adamw" else 1 if optim.momentum else 0
    return Footprint(
        weights=weights, state=gradients * (1 + moments) + (weights if average else 0),
        constant=max(0, peaks[0] - sizes[0] * image), image=max(1, image),
    )  # fmt: skip


def training_pass(
    model: nn.Module, batch: Batch, *, criterion: Callable[..., dict[str, Tensor]],
    normalisers: Callable[[Tensor], dict[str, Tensor]], precision: Precision,
) -> None:  # fmt: skip
    """Forward, loss and backward as `fit` does them, without accelerate's wrappers."""
    totals = normalisers(batch.masks)
    with torch.autocast(batch.images.device.type, HALF.get(precision), enabled=precision in HALF):
        out = model(batch.images)
    losses = criterion(convert_to_fp32(out), batch.masks, totals)
    torch.stack(list(losses.values())).sum().backward()


def probe_sizes(model: nn.Module, most: int | None) -> Sequence[int]:
    """The numbers of images to measure with: two, so that their difference is one image; one where only that fits.

    A BatchNorm may refuse a single image, of which it would normalise one value a channel.
    """
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    first = 2 if normed and most != 1 else 1
    return [first] if most is not None and most <= first else [first, first + 1]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put the model into training, and afterwards its modes, buffers, gradients and all generators back."""
    modes = {module: module.training for module in model.modules()}
    buffers, random = [(buffer, buffer.clone()) for buffer in model.buffers()], random_state()
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        restore_random(random)


def peak_bytes(run: Callable[[], None], device: torch.device, resident: Iterable[Tensor]) -> int:
    """The most bytes that `run` had alive at once beyond the `resident` tensors and what it found allocated."""
    if device.type == "cuda":  # the allocator knows best: it also sees the kernels' own buffers
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes(resident) as live:
        run()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, until each is freed; those of `resident` tensors are left out."""

    def __init__(self, resident: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in resident}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # views share it
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def largest_batch(need: Footprint, free: int, *, parts: int, most: int = LARGEST) -> int:
    """The largest batch, up to `most` images, whose micro-batches fill at most 80 % of the `free` memory.

    A multiple of `parts` (micro-batches x processes), and an even one where there is a choice. Raises UserError where
    not even one image fits.
    """
    micro = int((SHARE * free - need.coming(0)) // need.image)
    if micro < 1:
        raise UserError(
            f"not even one image fits: a step needs {amount(need.coming(1))} and {100 * SHARE:.0f} % of "
            f"{amount(free)} is free for it; use a smaller model or a smaller augment.crop"
        )
    micro = min(micro, max(1, most // parts))
    if micro > 1 and micro * parts % 2:
        micro -= 1
    return micro * parts


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_ALLOCATOR)


def amount(size: float) -> str:
    """A size for people: 34 MB, 1.2 GB, 31 GB."""
    if size < 1e9:
        return f"{size / 1e6:.3g} MB"
    return f"{size / 1e9:.1f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"
