"""Tensors out of a TorchScript archive, the form of OpenAI's published weights, without running anything in it.

`torch.jit.load` would load the archive's program, and `torch.load(weights_only=True)` refuses it. The archive is a zip:
a pickle of the module tree and one raw file for each storage. The pickle is read with every class replaced by an inert
one, so that only names, numbers and tensors come out.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "BoolStorage": torch.bool, "ByteStorage": torch.uint8,
}  # fmt: skip


def is_script(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip with constants beside its data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_script(path: Path) -> dict[str, Tensor]:
    """The tensors of the module in a TorchScript archive, by their names in the module, and its own whole numbers.

    Raises pickle.UnpicklingError for anything in it that is neither a module nor data, KeyError for missing parts.
    """
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        module = _Reader(archive, root).load()
    if not isinstance(module, _Part):
        raise pickle.UnpicklingError(f"the archive holds a {type(module).__name__}, not a module")
    return dict(_tensors(module, ""))


class _Part:
    """Stands for a module of the archive: its attributes by name, and no behaviour."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = dict(state)


class _Reader(pickle.Unpickler):
    """Reads the module tree; what a name may stand for is listed in `find_class`, all else is refused."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Part
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # typed lists
            return lambda data, *_: data
        raise pickle.UnpicklingError(f"{module}.{name} is not data")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat[:count]


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min(offset, 0, *stride) < 0 or (0 not in size and last >= len(storage)):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return storage.as_strided(size, stride, offset).clone()


def _tensors(part: _Part, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in part.attributes.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Part):
            yield from _tensors(value, f"{prefix}{name}.")
        elif type(value) is int and not prefix:  # of the three that tell OpenAI's archives from others
            yield name, torch.tensor(value)
