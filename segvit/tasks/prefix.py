"""What several networks on one backbone compute alike, computed once.

A backbone is a row of steps: embedding and blocks of a plain ViT, the parts of timm's pyramids, else the whole as one.
Networks agree up to a step when its modules, and those before, have the same settings and read the very same tensors.
An adapter brings tensors of its own, so that the agreement ends where it first acts; without one it reaches to the end.

Shapes    B images; rows are the numbers of the images in the batch that a network is asked about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from timm.layers import DropPath
from timm.models import FeatureListNet
from torch import Tensor, nn

from segvit.adapters.places import backbone_of
from segvit.backbones.pyramid import Pyramid
from segvit.backbones.vit import PlainViT
from segvit.contracts import Features
from segvit.nn.tokens import Step, pad_to_patches
from segvit.systems.segvit import ShrunkSegViT

if TYPE_CHECKING:
    from collections.abc import Iterator

IDLE = (nn.Dropout, DropPath, nn.Identity)  # without effect outside of training
ELSEWHERE = {"training", "past", "out_indices", "checkpointing"}  # settings that change no step
State = Any  # behind a step: Step, Tensor (a part's output) or what the whole backbone returns


class Known(nn.Module):
    """Stands in for a backbone whose output is known."""

    def __init__(self, output: State) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> State:
        return self.output


class Shared(NamedTuple):
    """The output of a step that several networks share."""

    rows: tuple[int, ...]
    state: State


def stepwise(backbone: nn.Module) -> bool:
    """Whether a backbone can be stopped between its parts."""
    return isinstance(backbone, PlainViT) or (
        isinstance(backbone, Pyramid) and isinstance(backbone.network, FeatureListNet)
    )


def number_steps(models: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """A number for each step of each backbone; equal numbers mean the same output up to there."""
    known: dict[tuple[int, Hashable], int] = {}
    numbers = {}
    for name, model in models.items():
        own = [-1]
        for key in step_keys(model):
            own.append(known.setdefault((own[-1], key), len(known)))
        numbers[name] = tuple(own[1:])
    return numbers


def step_keys(model: nn.Module) -> list[Hashable]:
    """What the output of each step depends on besides its input, for the steps that the network runs as they are."""
    _, backbone = backbone_of(model)
    if isinstance(backbone, PlainViT):
        later = {"blocks", "gaps", "norm"}
        keys = [(_own(backbone), *(_all(child) for name, child in backbone.named_children() if name not in later))]
        # From there on the shrunk network has fewer tokens.
        end = model.shrink_at if isinstance(model, ShrunkSegViT) else backbone.out_indices[-1] + 1
        return [*keys, *((_gap(backbone, i), _all(backbone.blocks[i])) for i in range(end))]
    if isinstance(backbone, Pyramid) and isinstance(backbone.network, FeatureListNet):
        keys, maps = [], 0
        for name, part in backbone.network.items():
            keys.append((_own(backbone), _gap(backbone, maps), _all(part)))
            maps += name in backbone.network.return_layers
        return list(keys)
    return [_all(backbone)]


def run_step(backbone: nn.Module, number: int, state: State) -> State:
    """One step; that of number 0 takes the images."""
    if isinstance(backbone, PlainViT):
        return backbone.run(number - 1, state) if number else backbone.embed(state)
    if isinstance(backbone, Pyramid) and isinstance(backbone.network, FeatureListNet):
        cell = backbone.strides[-1]
        return list(backbone.network.values())[number](state if number else pad_to_patches(state, (cell, cell)))
    return backbone(state)


@contextmanager
def resumed(model: nn.Module, past: Sequence[State]) -> Iterator[None]:
    """Within, the network does not compute the first steps of its backbone: their outputs are `past`."""
    place, backbone = backbone_of(model)
    above, _, leaf = place.rpartition(".")
    if not past:
        yield
    elif stepwise(backbone):
        vars(backbone)["past"] = tuple(past)
        try:
            yield
        finally:
            vars(backbone)["past"] = ()
    else:
        setattr(model.get_submodule(above), leaf, Known(past[0]))
        try:
            yield
        finally:
            setattr(model.get_submodule(above), leaf, backbone)


class Together:
    """The shared steps of one batch, each run once on all the rows that need it."""

    def __init__(
        self, images: Tensor, rows: Mapping[str, tuple[int, ...]], numbers: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.images, self.rows, self.numbers = images, rows, numbers
        self.users = Counter(number for name in rows for number in numbers[name])
        self.done: dict[int, Shared] = {-1: Shared(tuple(range(len(images))), images)}

    def past(self, name: str, model: nn.Module) -> list[State]:
        """The outputs of the steps that a network shares with others, for its rows."""
        _, backbone = backbone_of(model)
        past, before = [], -1
        for place, number in enumerate(self.numbers[name]):
            if self.users[number] < 2:
                break
            if number not in self.done:
                needed = {row for other in self.rows if number in self.numbers[other] for row in self.rows[other]}
                rows = tuple(sorted(needed))
                self.done[number] = Shared(rows, run_step(backbone, place, select(self.done[before], rows)))
            past.append(select(self.done[number], self.rows[name]))
            before = number
        return past

    def own_images(self, name: str) -> Tensor:
        """The images that a network is asked about."""
        chosen: Tensor = select(self.done[-1], self.rows[name])
        return chosen


def select(shared: Shared, rows: tuple[int, ...]) -> State:
    """A step's output for some of its rows."""
    return shared.state if rows == shared.rows else take(shared.state, [shared.rows.index(row) for row in rows])


def take(state: State, chosen: list[int]) -> State:
    """Those images of a step's output."""
    match state:
        case Step():
            extras = {name: value[chosen] for name, value in state.extras.items()}
            return state._replace(tokens=state.tokens[chosen], extras=extras)
        case Features():
            extras = {name: value[chosen] for name, value in state.extras.items()}
            pooled = None if state.pooled is None else state.pooled[chosen]
            return state._replace(maps=take(state.maps, chosen), pooled=pooled, extras=extras)
        case list() | tuple():
            return [take(part, chosen) for part in state]
        case dict():
            return type(state)((name, take(part, chosen)) for name, part in state.items())
    return state[chosen]


def _gap(backbone: PlainViT | Pyramid, number: int) -> Hashable:
    """The adapter before a step, if any."""
    name = str(number)
    return _all(backbone.gaps[name]) if name in backbone.gaps else None


def _all(module: nn.Module) -> Hashable:
    """Settings and tensors of a module and its parts."""
    return tuple((name, _own(part)) for name, part in module.named_modules() if not isinstance(part, IDLE))


def _own(module: nn.Module) -> Hashable:
    """Type, settings and addresses of the tensors of a module without its parts."""
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    settings = [(name, _setting(value)) for name, value in vars(module).items()
                if name not in ELSEWHERE and isinstance(value, bool | int | float | str | tuple | list)]  # fmt: skip
    return type(module), tuple(settings), tuple((name, item.data_ptr(), item.shape) for name, item in tensors)


def _setting(value: Any) -> Hashable:
    """A number or word as text; what holds modules counts as itself only."""
    held = isinstance(value, tuple | list) and any(isinstance(part, nn.Module) for part in value)
    return id(value) if held else repr(value)
