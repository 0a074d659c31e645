"""Class names to unit vectors of CLIP's joint space: templates, synonyms, ensembling, and a cache on disk.

Every sentence's vector is normalised; a class is the mean over its templates and synonyms, normalised again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from segvit.contracts import UserError
from segvit.files import cache_folder, write_bytes
from segvit.text.checkpoint import Checkpoint, read_tensors
from segvit.text.templates import fill, find_templates
from segvit.text.tokenize import tokenize
from segvit.text.tower import TextTower, build_text, end_positions

Name = str | Sequence[str]  # a class: one name, or synonyms
BATCH = 256  # sentences at a time


def class_embeddings(
    tower: TextTower, names: Sequence[Name], *, templates: str | Sequence[str] = "photo", cache: bool = True
) -> Tensor:
    """Unit vectors (K, E) of classes, on the tower's device.

    `templates` is a name of `TEMPLATES`, `imagenet`, or templates with one `{}`. With `cache` the result is kept in the
    user's cache folder under a hash of the tower's weights and the sentences. Raises UserError for an empty list, an
    empty or repeated name, and a sentence that is too long.
    """
    sentences = class_sentences(names, templates=templates)
    like = tower.text_projection
    if not cache:
        return embed_sentences(tower, sentences).to(like.dtype)
    path = cache_folder() / "text" / f"{_digest(tower, sentences)}.safetensors"
    known = _read(path, (len(sentences), tower.embed_dim))
    if known is None:
        known = embed_sentences(tower, sentences).float().cpu()
        write_bytes(path, save({"embeddings": known.contiguous()}))
    return known.to(like.device, like.dtype)


def class_sentences(names: Sequence[Name], *, templates: str | Sequence[str] = "photo") -> list[list[str]]:
    """All sentences of each class. Raises UserError for an empty list and an empty or repeated name."""
    chosen = find_templates(templates)
    words = [[name] if isinstance(name, str) else list(name) for name in names]
    if not words:
        raise UserError("the list of classes is empty; name one class or more")
    seen: dict[str, int] = {}
    for number, synonyms in enumerate(words):
        for word in synonyms or [""]:
            plain = " ".join(word.lower().split())
            if not plain:
                raise UserError(f"class {number} has an empty name; give every class a word")
            if seen.setdefault(plain, number) != number:
                raise UserError(f"{word!r} names two classes, {seen[plain]} and {number}; leave one out")
    return [[fill(template, word) for word in synonyms for template in chosen] for synonyms in words]


@torch.no_grad()
def embed_sentences(tower: TextTower, sentences: Sequence[Sequence[str]]) -> Tensor:
    """The unit vector of each group of sentences, (groups, E)."""
    flat = sorted({sentence for group in sentences for sentence in group}, key=len)  # so that lengths in a batch agree
    place = {sentence: index for index, sentence in enumerate(flat)}
    tokens = tokenize(flat, context_length=tower.context_length)
    device, vectors = tower.text_projection.device, []
    for batch in tokens.split(BATCH):
        # What follows the end is never seen by it, for attention looks back only.
        used = int(end_positions(batch).max()) + 1
        vectors.append(F.normalize(tower(batch[:, :used].to(device)), dim=-1))
    every = torch.cat(vectors)
    means = [every[[place[sentence] for sentence in group]].mean(0) for group in sentences]
    return F.normalize(torch.stack(means), dim=-1)


def class_vectors(
    found: Checkpoint, names: Sequence[Name] | None, *, num_classes: int, templates: str | Sequence[str],
    file: str | None,
) -> Tensor:  # fmt: skip
    """The unit vectors (K, E) that a model is built with: those in a file, or of the names, or random without weights.

    Raises UserError for another number of names or vectors than classes.
    """
    if names is not None and len(names) != num_classes:
        raise UserError(f"class_names has {len(names)} entries, but the model has {num_classes} classes")
    if file is not None:
        return read_vectors(Path(file).expanduser(), (num_classes, found.vision.embed_dim))
    if found.state is None:
        return F.normalize(torch.randn(num_classes, found.vision.embed_dim), dim=-1)
    if names is None:
        raise UserError("class_names are needed with CLIP's weights: their text tower makes the class vectors")
    return class_embeddings(build_text(found), names, templates=templates).detach()


def read_vectors(path: Path, shape: tuple[int, int]) -> Tensor:
    """The class vectors in a .npy, .npz, .safetensors or .pt file, made unit ones.

    Raises UserError unless there is one table of that shape (K, E) in it.
    """
    try:
        content = np.load(path) if path.suffix in (".npy", ".npz") else read_tensors(path)
        tables = [content] if isinstance(content, np.ndarray) else [content[key] for key in content]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as class vectors ({error}); give .npy, .npz or .safetensors") from error
    if len(tables) != 1 or tuple(tables[0].shape) != shape:
        raise UserError(f"{path} holds {[tuple(t.shape) for t in tables]}; give one table {shape}: classes, channels")
    return F.normalize(torch.as_tensor(tables[0]).float(), dim=-1)


def _digest(tower: TextTower, sentences: list[list[str]]) -> str:
    """Of all that decides about the result."""
    code = hashlib.sha256(repr((astuple(tower.config), sentences)).encode())
    for name, tensor in tower.state_dict().items():
        code.update(name.encode() + str(tensor.dtype).encode())
        code.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return code.hexdigest()


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """What the cache holds; None where it has nothing whole."""
    try:
        found = load_file(path)["embeddings"]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if found.shape == shape else None
