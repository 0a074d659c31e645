"""Segmentation by words: other classes without training, a background, seen and unseen figures, fixed embeddings.

Systems   ZegCLIP and zsseg take any words: a class is a vector of CLIP's text tower, which is read from the weights the
          model was made with and not kept. DenseCLIP takes other words for the classes that it has.
Gap       A class is seen when one of its words, or synonyms, names a class that was in the loss; all others are unseen.
          So ZegCLIP's calibration, and zsseg's weight of both opinions, mean the same for any list of classes.

Shapes    B images, K classes, R W a band of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from segvit.contracts import Classes, Dense, ModelConfig, Readout, Runtime, Size, UserError
from segvit.inference.predictor import TorchRuntime
from segvit.metrics.confusion import Metrics
from segvit.metrics.open_vocabulary import open_vocabulary
from segvit.metrics.ratios import number
from segvit.model_folder import load_model, save_model
from segvit.palette import generate_palette
from segvit.systems.denseclip import DenseCLIP, PostModel, fix_words
from segvit.systems.zegclip import ZegCLIP
from segvit.systems.zsseg import ZSSeg
from segvit.text.architecture import clip_config, describe_config
from segvit.text.class_list import BACKGROUND, background_words, read_classes, same
from segvit.text.embeddings import Name, class_embeddings, class_sentences
from segvit.text.splits import SPLITS, unseen_ids
from segvit.text.tokenize import tokenize, word_pieces
from segvit.text.tower import text_tower
from segvit.zoo import builder_options, find_again, find_system

if TYPE_CHECKING:
    from segvit.contracts import Model

Background = Literal["none", "threshold", "words"]

GRAY = (90, 90, 90)  # of the background, which generated palettes do not hold
ALIKE = 0.99  # cosine of a class's vector with what the same word gives now; half precision costs less than 0.001


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a command says about words: see `set_classes` and `set_gap` for the fields."""

    classes: str | tuple[str, ...] | None = None
    background: Background = "none"
    threshold: float | None = None
    text_weights: str | None = None
    gap: float | None = None

    def __post_init__(self) -> None:
        check_background(self.background, self.threshold)

    def of_data(self, classes: Classes) -> Vocabulary:
        """The same where `data` means a dataset's own names."""
        return replace(self, classes=classes.names) if self.classes == "data" else self

    def apply(self, model: Model) -> None:
        """Tell a model, in place."""
        if self.classes is not None or self.background != "none":
            set_classes(
                model, self.classes, background=self.background, threshold=self.threshold,
                text_weights=self.text_weights,
            )  # fmt: skip
        elif self.text_weights is not None:
            raise UserError("text weights are for other classes; give --classes too, or leave --text_weights out")
        if self.gap is not None:
            set_gap(model, self.gap)


def set_classes(
    model: Model, classes: str | Sequence[Name] | None = None, *, background: Background = "none",
    threshold: float | None = None, text_weights: str | None = None,
) -> None:  # fmt: skip
    """Tell a model other classes by their words, in place and without training.

    `classes` are names, each maybe with synonyms as a list (the vectors of all sentences are averaged), or text as
    `read_classes` takes it; None keeps the model's own. `background`: none, every pixel gets a class; threshold, pixels
    whose best probability is below `threshold` become a class more, which is a way to read the model and not saved with
    it; words, a class more of common background words competes with the others. `text_weights` say where CLIP's text
    tower is now, a tag or a file, if not where the model was made. Raises UserError for an empty list, repeated or long
    names, and models that know no words.
    """
    check_background(background, threshold)
    if not isinstance(model, ZegCLIP | ZSSeg | DenseCLIP):
        raise UserError(f"{model.config.name} knows no words, its classes are those of its training; use zegclip_*")
    model.classes, model.readout = model.config.classes, find_system(model.config.name).readout
    if classes is not None or background == "words":
        listed = read_classes(classes) if isinstance(classes, str) else listed_words(classes, model)
        _refuse_background(listed, background)
        if background == "words":
            listed.append(background_words(listed))
        rename_classes(model, listed, text_weights=text_weights)
        model.classes = model.config.classes
    if threshold is not None:
        _refuse_background([[name] for name in model.classes.names], background)
        model.readout = with_background(model, threshold)
        model.classes = Classes((*model.classes.names, BACKGROUND), (*model.classes.palette, GRAY))


def listed_words(classes: Sequence[Name] | None, model: Model) -> list[list[str]]:
    """Classes with their synonyms: those given, or else the model's own."""
    given = (model.config.options.get("class_names") or model.config.classes.names) if classes is None else classes
    return [[name] if isinstance(name, str) else list(name) for name in given]


def check_background(background: Background, threshold: float | None) -> None:
    """Raises UserError for a threshold without its rule, the rule without one, and a number that is no probability."""
    if background == "threshold" and threshold is None:
        raise UserError("background threshold needs a probability below which pixels are background; give a threshold")
    if background != "threshold" and threshold is not None:
        raise UserError(f"threshold {threshold} has no effect with background {background}; set background threshold")
    if threshold is not None and not 0 < threshold < 1:
        raise UserError(f"threshold is {threshold}; give a probability between 0 and 1")


def _refuse_background(words: list[list[str]], background: Background) -> None:
    if background != "none" and any(same(name) == BACKGROUND for names in words for name in names):
        raise UserError(f"a class is named background already; leave it out, or the background rule {background!r}")


def rename_classes(model: Model, words: list[list[str]], *, text_weights: str | None) -> None:
    """Other words for a model, in place, written into its configuration, so that it is saved with them."""
    class_sentences([[same(name) for name in names] for names in words], templates="name")  # refuses repeated names
    record: dict[str, Any] = model.config.words or {}
    if record.get("frozen"):
        raise UserError("this model's classes are frozen, it knows no words; use the one that it was made from")
    options = dict(model.config.options)
    if isinstance(model, DenseCLIP):
        _rename_dense(model, words, len(model.config.classes), options)
        options["class_names"] = [names[0] for names in words]
    else:
        assert isinstance(model, ZegCLIP | ZSSeg)
        known, seen = spoken(model, listed_words(None, model)), model.get_buffer("seen").tolist()
        trained: list[str] = record.get("trained") or [
            same(name) for names, is_seen in zip(known, seen, strict=True) if is_seen for name in names
        ]
        source = find_again(text_weights) if text_weights else record.get("weights")
        vectors = word_vectors(model, known, spoken(model, words), source=source)
        unseen = [k for k, names in enumerate(words) if not any(same(name) in trained for name in names)]
        model.set_classes(vectors, unseen=unseen)
        options |= {"class_names": spoken(model, words), "unseen": unseen}
        record = {"weights": source, "trained": trained}
    classes = Classes(tuple(names[0] for names in words), _palette(words))
    model.config = replace(model.config, options=options, classes=classes, words=record or None)


def _palette(words: list[list[str]]) -> tuple[tuple[int, int, int], ...]:
    own = words[-1][0] == BACKGROUND
    return generate_palette(len(words) - 1) + (GRAY,) if own else generate_palette(len(words))


def spoken(model: Model, words: list[list[str]]) -> list[list[str]]:
    """Names as the system's sentences have them: ZegCLIP's without underscores."""
    return [[name.replace("_", " ") for name in names] for names in words] if isinstance(model, ZegCLIP) else words


def word_vectors(model: Model, known: list[list[str]], words: list[list[str]], *, source: str | None) -> Tensor:
    """Unit vectors (K, E) of the words by the text tower in the weights `source`.

    Raises UserError without weights, and for those that do not make the vectors of the `known` words in the model.
    """
    name, option = clip_name(model.config)
    if source is None:
        raise UserError("the model was made without CLIP's weights, so it knows no words; give text_weights if it was "
                        "made with some")  # fmt: skip
    if Path(source).is_absolute() and not Path(source).exists():
        raise UserError(f"the words need CLIP's text tower, which was in {source}; give text_weights, where it is now")
    templates = builder_options(model.config)["templates"]
    places = ("class_embeddings", "region_embeddings")[: 1 + isinstance(model, ZSSeg)]
    own = torch.stack([model.get_buffer(place) for place in places])  # (1 or 2, K, E)
    tower = text_tower(name, weights=source).to(own.device)
    now = class_embeddings(tower, known, templates=templates).to(own)
    if now.shape != own.shape[1:] or float((now * own).sum(-1).min()) < ALIKE:
        raise UserError(
            f"the text tower in {source} does not make the vectors of the model's own classes; give the text_weights "
            f"that it was made with ({option} {str(name)[:40]}), without learned prompts"
        )
    return class_embeddings(tower, words, templates=templates).to(own)


def clip_name(config: ModelConfig) -> tuple[str | dict[str, Any], str]:
    """Which CLIP a model is built on, and the option that says so."""
    options = builder_options(config)
    option = "clip" if "clip" in options else "backbone"
    return options[option], option


def _rename_dense(model: DenseCLIP, words: list[list[str]], count: int, options: dict[str, Any]) -> None:
    """Its head has a channel for each class of its training; the words of those may be others."""
    read = model.prompting.words
    if isinstance(read, nn.Identity):
        raise UserError("this model's words are fixed, it knows no others; use the one that it was made from")
    if len(words) != count or any(len(names) > 1 for names in words):
        raise UserError(
            f"DenseCLIP takes other words for the {count} classes that it was trained on, one each and in their order, "
            f"got {len(words)} or synonyms; for other classes use zegclip_* or zsseg_*"
        )
    names, contexts = [each[0] for each in words], options.get("num_contexts", 8)
    length = options.get("text_length") or max(len(word_pieces(name)) for name in names) + 2
    room = read.get_submodule("tower").get_parameter("positional_embedding").shape[0] - contexts
    tokens = tokenize(names, context_length=min(length, room))
    read.register_buffer("tokens", tokens.to(read.get_buffer("tokens").device), persistent=False)
    if isinstance(model.prompting, PostModel):
        model.prompting.read = None


def with_background(model: Model, threshold: float) -> Readout:
    """The model's readout with a channel more, which wins where the best class's probability is below the threshold.

    That probability is ZegCLIP's sigmoid before the gap is taken off, zsseg's score itself, a sum over masks, and
    DenseCLIP's softmax. Scores of windows and scales are averaged as those of classes are.
    """
    base = model.readout

    def scores(out: Dense, size: Size, rows: range) -> Tensor:
        values = base(out, size, rows)  # (B, K, R, W)
        if isinstance(model, ZegCLIP):
            best = values.argmax(1, keepdim=True)
            level = threshold - out.extras["bias"].gather(1, best.flatten(1)).view_as(best)
        elif isinstance(model, ZSSeg):
            level = torch.full_like(values[:, :1], threshold)
        else:
            level = values.logsumexp(1, keepdim=True) + torch.tensor(threshold).log().to(values)
        return torch.cat([values, level], dim=1)

    return base._replace(scores=scores, masks=None)


def set_gap(model: Model, gap: float) -> None:
    """What ZegCLIP takes off the scores of seen classes, in place. Raises UserError for models without a gap."""
    if not isinstance(model, ZegCLIP):
        raise UserError(f"{model.config.name} takes no gap off the seen classes; leave the gap out, or use zegclip_*")
    if not 0 <= gap <= 1:
        raise UserError(f"gap is {gap}; it is taken off probabilities, so give a number from 0 to 1")
    model.seen_bias = gap
    model.config = replace(model.config, options=model.config.options | {"seen_bias": gap})


def freeze_classes(model: Model) -> None:
    """Make a closed-vocabulary model, in place: class vectors are tensors of it, and there is no text tower.

    Outputs stay as they are. The model saves and loads as any other, also where open_clip is not installed, and can be
    exported; it takes no other words. Raises UserError for models without words, a background by threshold, which is no
    part of a model, and DenseCLIP's pre-model prompting, whose words depend on the image.
    """
    if not isinstance(model, ZegCLIP | ZSSeg | DenseCLIP):
        raise UserError(f"{model.config.name} knows no words, there is nothing to freeze")
    if len(model.classes) != len(model.config.classes):
        raise UserError("a background by threshold is no part of a model; freeze without it, and give it in use")
    name, option = clip_name(model.config)
    options = model.config.options | {option: describe_config(clip_config(name))}
    options.pop("class_names", None)
    if isinstance(model, DenseCLIP):
        if not isinstance(model.prompting.words, nn.Identity):
            fix_words(model)
        options["prompting"] = "fixed"
    elif isinstance(options.get("unseen"), str):  # a split is looked up by names
        options["unseen"] = unseen_classes(model)
    model.config = replace(model.config, options=options, words={"frozen": True})


def freeze_run(run: str, out: str, vocabulary: Vocabulary) -> None:
    """Load a model, tell it other words if wanted, freeze it and write its folder.

    Raises UserError for a folder that holds a model or anything else already.
    """
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise UserError(f"{out} is not empty; choose another --out")
    model = load_model(run)
    vocabulary.apply(model)
    freeze_classes(model)
    save_model(model, out)


def unseen_classes(model: object) -> list[int]:
    """The ids of the classes that training hid; none for models without words."""
    if not isinstance(model, ZegCLIP | ZSSeg):
        return []
    return [number for number, seen in enumerate(model.get_buffer("seen").tolist()) if not seen]


def find_unseen(wanted: str | None, run: Runtime, classes: Classes) -> list[int]:
    """Unseen ids: those of the model that runs, of a split of `segvit.text.splits`, or of names parted by commas.

    Raises UserError for names that no class has.
    """
    if wanted is None:
        return unseen_classes(run.model) if isinstance(run, TorchRuntime) else []
    if wanted in SPLITS:
        return list(unseen_ids(wanted, num_classes=len(classes), class_names=classes.names))
    names = [same(name) for name in classes.names]
    missing = [part for part in wanted.split(",") if same(part) not in names]
    if missing:
        raise UserError(
            f"unseen {missing[0].strip()!r} is neither a class of the data nor a split ({', '.join(SPLITS)}); give "
            "names parted by commas"
        )
    return sorted({names.index(same(part)) for part in wanted.split(",")})


def seen_and_unseen(metrics: Metrics, unseen: Sequence[int], classes: Classes) -> tuple[dict[str, Any], str]:
    """The generalised zero-shot figures of a whole dataset, for machines and in a line for people."""
    found = open_vocabulary(metrics, unseen=unseen)
    record = {name: number(value) for name, value in found._asdict().items()}
    line = f"seen {found.seen:.4f}  unseen {found.unseen:.4f}  hIoU {found.harmonic:.4f}  pAcc {found.aacc:.4f}"
    text = f"{line}  ({len(unseen)} of {len(classes)} classes unseen)"
    return record | {"unseen_classes": [classes.names[k] for k in unseen]}, text
