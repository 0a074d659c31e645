"""Official checkpoints into model folders, with the class vectors that those of ZegCLIP and zsseg leave out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from segvit.backbones.weights import read_state, unwrap
from segvit.contracts import Classes, UserError
from segvit.data.description import read_class_file
from segvit.model_folder import load_state, save_model
from segvit.systems.zegclip import ZegCLIP
from segvit.systems.zsseg import ZSSeg
from segvit.text.architecture import config_of
from segvit.text.checkpoint import Checkpoint, find_clip
from segvit.text.embeddings import class_embeddings, read_vectors
from segvit.text.prompt import LearnedPrompt, convert_prompt
from segvit.text.tower import NOT_TEXT, build_text
from segvit.zoo import builder_options, create_model, find_again, find_system, numbered_classes

if TYPE_CHECKING:
    from segvit.contracts import Model

ADAPTERS = ("clip_adapter.", "_region_clip_adapter.")  # zsseg's: for the queries, and maybe another for the regions
TOWERS = ("text_encoder.", *(f"{adapter}clip_model." for adapter in ADAPTERS))
OURS = ("class_embeddings", "region_embeddings", "seen", "num_batches_tracked")  # of keys that no original may have


@dataclass(frozen=True, kw_only=True)
class Words:
    """Where class vectors come from: a file of them, or CLIP's weights; by default the checkpoint's own text tower."""

    vectors: str | None = None
    text_weights: str | None = None


def convert_checkpoint(
    checkpoint: str, name: str, out: str, *, num_classes: int | None, classes: str | None, image_size: int | None,
    options: dict[str, Any] | None = None, words: Words = Words(),
) -> None:  # fmt: skip
    """Write a model folder from an official checkpoint; `options` are the builder's, for other sizes than its own.

    Raises UserError when it does not fit the model, and when the vectors of classes can come from nowhere.
    """
    table = _classes(num_classes, classes)
    official = unwrap(read_state(Path(checkpoint).expanduser()))
    state = find_system(name).convert(official)
    given, positions = dict(options or {}), state.get("backbone.pos_embed")
    if image_size is not None:
        given["image_size"] = image_size
    elif positions is not None and "image_size" not in given:  # the class's, then one for each patch of a square crop
        given["image_size"] = math.isqrt(positions.shape[1] - 1) * state["backbone.patch_embed.proj.weight"].shape[-1]
    model = create_model(name, classes=table, **given)
    if isinstance(model, ZegCLIP | ZSSeg):
        tell_classes(model, official, words, named=classes is not None, source=checkpoint)
    elif words != Words():
        raise UserError(f"{name} keeps its words in the checkpoint; leave vectors and text_weights out")
    own = {key: value for key, value in model.state_dict().items() if key.endswith(OURS)}
    load_state(model, own | state, source=checkpoint)
    save_model(model, out)


def tell_classes(model: Model, official: dict[str, Tensor], words: Words, *, named: bool, source: str) -> None:
    """Give a model with open words the vectors of its classes, in place; which are unseen stays.

    `named` is whether the classes have names of the user's. Raises UserError when there is nothing to make vectors of.
    """
    hidden = (~model.get_buffer("seen")).nonzero().flatten().tolist()
    if words.vectors is not None:
        classes, width = model.get_buffer("class_embeddings").shape
        found = [read_vectors(Path(words.vectors).expanduser(), (classes, width))]
    elif not named:
        raise UserError(
            f"{source} holds no class vectors; give --classes FILE, the names that they are made of, or --vectors FILE"
        )
    else:
        found = [_vectors(model, official, words, place, source) for place in ADAPTERS[: 1 + isinstance(model, ZSSeg)]]
    if isinstance(model, ZSSeg):
        model.set_classes(found[0], unseen=hidden, regions=found[-1])
    else:
        cast(ZegCLIP, model).set_classes(found[0], unseen=hidden)
    if words.text_weights is not None:
        model.config = replace(model.config, words={"weights": find_again(words.text_weights)})


def _vectors(model: Model, official: dict[str, Tensor], words: Words, place: str, source: str) -> Tensor:
    """The names' vectors, by the prompt that was learned there if there is one, else by the builder's templates."""
    tower = build_text(_text(model, official, words, source))
    learner = {key: value for key, value in official.items() if key.startswith(f"{place}prompt_learner.")}
    if not learner and place != ADAPTERS[0]:  # no adapter of its own for the regions
        return _vectors(model, official, words, ADAPTERS[0], source)
    names = [name.replace("_", " ") if isinstance(model, ZegCLIP) else name for name in model.classes.names]
    if any(key.endswith(("prefix_prompt", "suffix_prompt")) for key in learner):
        state = convert_prompt(learner)
        prompt = LearnedPrompt(tower.width, prefix=len(state["prefix"]), suffix=len(state["suffix"]))
        prompt.load_state_dict(state)
        return prompt(tower, names).detach()
    return class_embeddings(tower, names, templates=builder_options(model.config)["templates"])


def _text(model: Model, official: dict[str, Tensor], words: Words, source: str) -> Checkpoint:
    """The text tower of the weights that were given, else of the checkpoint."""
    if words.text_weights is not None:
        options = builder_options(model.config)
        return find_clip(options["backbone" if isinstance(model, ZegCLIP) else "clip"], words.text_weights)
    for place in TOWERS:
        own = {key.removeprefix(place): value for key, value in official.items() if key.startswith(place)}
        own = {key: value.float() for key, value in own.items() if not key.startswith(NOT_TEXT)}
        if "text_projection" in own:
            return Checkpoint(config_of(own), own, source)
    raise UserError(
        f"{source} has no text tower to make class vectors with; give --text_weights, a file of CLIP, or --vectors FILE"
    )


def _classes(count: int | None, path: str | None) -> Classes:
    if path is not None:
        table, _ = read_class_file(Path(path))
        if count not in (None, len(table)):
            raise UserError(f"{path} names {len(table)} classes but num_classes is {count}; leave one out")
        return table
    if count is None:
        raise UserError("give --classes FILE (one name a line) or --num_classes")
    return numbered_classes(count)
