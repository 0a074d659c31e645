"""The record of what an adapter did to a network, and the way back: switch off, take out, merge.

A tuning method is a function `method(backbone, *, options) -> Handle`. It gets a backbone whose parameters are all
frozen, changes it in place through the handle (`replace` a module, `add` one, `tune` a parameter that is there) and
returns the handle. What it inserts trains; nothing else of the backbone does, unless tuned. Keys of what it does not
replace stay the same; a replaced layer keeps the old one as `base_layer`, as in peft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segvit.contracts import UserError


class Change(NamedTuple):
    """One module put into a parent, in the place of `old` (None = the place was empty)."""

    path: str  # inside the root, dotted
    parent: nn.Module
    old: nn.Module | None
    new: nn.Module

    def apply(self) -> None:
        setattr(self.parent, self.path.rpartition(".")[2], self.new)

    def revert(self) -> None:
        leaf = self.path.rpartition(".")[2]
        if self.old is None:
            delattr(self.parent, leaf)
        else:
            setattr(self.parent, leaf, self.old)


@dataclass
class Handle:
    """What a method changed in `root`; copies along with the network (`copy.deepcopy`), since it holds no closures.

    `merged` turns an inserted module into a plain one with the same output; None = the method cannot be merged.
    `recorded` are options to save in the place of those given, where what they named comes with the saved tensors.
    """

    root: nn.Module
    merged: Callable[[nn.Module], nn.Module] | None = None
    changes: list[Change] = field(default_factory=list)
    tuned: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of the base, with their other value
    enabled: bool = True
    recorded: dict[str, Any] = field(default_factory=dict)

    def replace(self, path: str, new: nn.Module) -> None:
        """Put `new` in the place of the module at `path`, which `new` usually keeps as its `base_layer`."""
        parent, _, leaf = path.rpartition(".")
        owner = self.root.get_submodule(parent)
        self._put(Change(path, owner, owner.get_submodule(leaf), new))

    def add(self, path: str, new: nn.Module) -> None:
        """Put `new` where there is nothing yet, such as `gaps.3`. Raises UserError when the place is taken."""
        parent, _, leaf = path.rpartition(".")
        owner = self.root.get_submodule(parent)
        if leaf in dict(owner.named_children()):
            raise UserError(f"{path} already holds an adapter; detach it first")
        self._put(Change(path, owner, None, new))

    def tune(self, path: str) -> None:
        """Let a parameter of the base train, keeping its value for `disable` and `detach`.

        The statistics of a batch norm move with it and are kept too.
        """
        parameter = self.root.get_parameter(path).requires_grad_(True)
        owner = self.root.get_submodule(path.rpartition(".")[0])
        moving = list(owner.buffers(recurse=False)) if isinstance(owner, nn.modules.batchnorm._BatchNorm) else []
        known = {id(tensor) for tensor, _ in self.tuned}
        for item in [parameter, *moving]:
            if id(item) not in known:
                # Kept in main memory, so that full tuning costs the device nothing; on meta there is nothing to keep.
                kept = item.detach() if item.is_meta else item.detach().cpu()
                self.tuned.append((item, kept.clone()))

    @property
    def names(self) -> list[str]:
        """The parameters that were added, by their names in the root while enabled."""
        found = []
        for change in self.changes:
            base = set() if change.old is None else {id(item) for item in change.old.parameters()}
            found += [f"{change.path}.{name}" for name, item in change.new.named_parameters() if id(item) not in base]
        return found

    @property
    def trained(self) -> list[str]:
        """All parameters of the root that the method trains: those added and those tuned."""
        tuned = {id(tensor) for tensor, _ in self.tuned}
        return self.names + [name for name, item in self.root.named_parameters() if id(item) in tuned]

    def tensors(self) -> dict[str, Tensor]:
        """All that the method stores: the tensors it added, buffers included, and those of the base that it tuned."""
        state = self.root.state_dict(keep_vars=True)
        wanted = {id(tensor) for tensor, _ in self.tuned}
        for change in self.changes:
            base = {} if change.old is None else change.old.state_dict(keep_vars=True)
            wanted |= {id(item) for item in change.new.state_dict(keep_vars=True).values()} - {*map(id, base.values())}
        return {name: tensor.detach() for name, tensor in state.items() if id(tensor) in wanted}

    def base_state(self) -> dict[str, Tensor]:
        """The frozen tensors of the root under their plain names: its state without the adapter and what is tuned."""
        tuned, enabled = {id(tensor) for tensor, _ in self.tuned}, self.enabled
        self.disable()
        state = {name: item for name, item in self.root.state_dict(keep_vars=True).items() if id(item) not in tuned}
        if enabled:
            self.enable()
        return state

    def disable(self) -> None:
        """Give the base network's output exactly, by putting back its modules and values; `enable` reverses it.

        What was put aside does not follow `root.to(...)`: move the network while enabled.
        """
        if self.enabled:
            for change in reversed(self.changes):
                change.revert()
            self._swap_tuned()
            self.enabled = False

    def enable(self) -> None:
        """Undo `disable`."""
        if not self.enabled:
            for change in self.changes:
                change.apply()
            self._swap_tuned()
            self.enabled = True

    def detach(self) -> None:
        """Take the adapter out for good: the very modules and values of the base are back, still frozen."""
        self.disable()
        for tensor, _ in self.tuned:
            tensor.requires_grad_(False)  # buffers among them have none anyway
        self.changes.clear()
        self.tuned.clear()

    def merge(self) -> None:
        """Fold the adapter into plain modules with the same output, for good.

        Raises UserError where the method adds what plain weights cannot hold, such as prompts.
        """
        if self.changes and self.merged is None:
            raise UserError("this adapter adds tokens or layers of its own, which no plain weights can stand for; "
                            "keep the adapter folder, or use ssf, svf or lora where merging matters")  # fmt: skip
        self.enable()
        for change in self.changes:
            assert self.merged is not None
            with torch.no_grad():
                plain = self.merged(change.new).requires_grad_(False)
            change._replace(new=plain.train(change.new.training)).apply()
        self.changes.clear()
        self.tuned.clear()

    def _put(self, change: Change) -> None:
        change.apply()
        change.new.train(self.root.training)
        self.changes.append(change)

    @torch.no_grad()
    def _swap_tuned(self) -> None:
        for tensor, other in self.tuned:
            mine = tensor.detach().cpu().clone()
            tensor.copy_(other)
            other.copy_(mine)
