"""Galleries: embeddings of many images in a file, and the nearest of them, through faiss.

File      NumPy's .npz: `embeddings` (M, C) float32 of length 1, `names` (M,) of the files below `root`, the `model`'s
          name, the digest of its `weights`, and one of the embeddings.
Class     of a gallery's image: the first folder of its name. Of a query: the nearest folder above it that has the name
          of a class of the gallery.
Policy    A query that is a file of the gallery does not find itself; copies of it are found.

Shapes    Q queries, M images of the gallery, C channels of an embedding.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from segvit.adapters.files import digest
from segvit.contracts import UserError
from segvit.files import open_atomic
from segvit.tasks.retrieve import embed_files, load_retriever
from segvit.tasks.sources import find_images

if TYPE_CHECKING:
    from segvit.contracts import Model

TRAINED = 39  # images that faiss wants for each list of an approximate index
PROBED = 1 / 16  # share of the lists that a query looks into
BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # what NumPy raises on files that are none

Vectors = NDArray[np.float32]


class Gallery(NamedTuple):
    """What a gallery's file says but for the embeddings, which are read when they are needed."""

    path: Path
    names: list[str]
    root: Path
    model: str
    weights: str
    digest: str

    def embeddings(self) -> Vectors:
        """(M, C), each of length 1. Raises UserError where they do not fit the names."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                vectors: Vectors = file["embeddings"]
        except BROKEN as error:
            raise damaged(self.path, error) from error
        if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != len(self.names):
            raise damaged(self.path, f"embeddings {vectors.shape} of {vectors.dtype} for {len(self.names)} names")
        return vectors

    def classes(self) -> list[str | None]:
        """The class of each image, None for one that lies in no folder."""
        return [name.partition("/")[0] if "/" in name else None for name in self.names]


def damaged(path: Path, why: object) -> UserError:
    """The error for a file that is no gallery."""
    return UserError(f"{path} cannot be read as a gallery ({why}); make it with segvit retrieve embed")


def write_gallery(
    source: str, model: str, out: str | Path, *, device: str | None = None, workers: int = 0
) -> list[str]:
    """Embed the images of a file, folder or pattern and write them; returns what is wrong with those left out.

    Raises UserError for a name that does not end in .npz, and where no image can be read.
    """
    if Path(out).suffix != ".npz":
        raise UserError(f"a gallery is a NumPy file; call it {Path(out).with_suffix('.npz')}")
    images = find_images(source)
    paths = list(images)
    network = load_retriever(model, device=device)
    found = embed_files(network, paths, workers=workers)
    root = os.path.abspath(paths[0])[: -len(str(images[paths[0]]))]
    with open_atomic(out) as file:
        np.savez(
            file, embeddings=found.vectors, names=np.array([images[paths[i]].as_posix() for i in found.kept]),
            root=np.array(root), model=np.array(network.config.name), weights=np.array(fingerprint(network)),
            digest=np.array(digest([torch.from_numpy(found.vectors)])),
        )  # fmt: skip
    return found.failed


def fingerprint(model: Model) -> str:
    """A digest of all weights and of how images enter the network: of models with another, embeddings differ."""
    state = model.state_dict()
    return digest([state[name] for name in sorted(state)], json.dumps([sorted(state), model.spec.to_json()]))


def read_gallery(path: str | Path, *, images: str | None = None) -> Gallery:
    """A gallery's file; `images` is the folder where its images are now, None = where they were.

    Raises UserError for a file that is none, an empty gallery, and a name that occurs twice.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            names: list[str] = file["names"].tolist()
            words = {key: str(file[key]) for key in ("root", "model", "weights", "digest")}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make a gallery with segvit retrieve embed") from None
    except BROKEN as error:
        raise damaged(path, error) from error
    if not names:
        raise UserError(f"{path} holds no images; make it again from a folder that has some")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"{path} names {twice} twice; make it again, each image once")
    root = words["root"] if images is None else images
    return Gallery(path, names, Path(root), words["model"], words["weights"], words["digest"])


def check_model(gallery: Gallery, model: Model, source: str) -> None:
    """Raise UserError where a gallery was made by other weights or for another input size."""
    if fingerprint(model) != gallery.weights:
        raise UserError(
            f"{gallery.path} was made by another model (a {gallery.model} with other weights or image size) than "
            f"{source}; give that model, or make the gallery again with this one"
        )


# Searching


class Neighbour(NamedTuple):
    """One image that was found, by its place in the gallery, and its cosine."""

    place: int
    score: float


class Found(NamedTuple):
    """A query, its class where that is known, and its neighbours, the nearest first."""

    path: Path
    label: str | None
    neighbours: list[Neighbour]


def search_files(
    source: str, gallery: Gallery, model: str, *, top: int, index: str | None = None, device: str | None = None,
    workers: int = 0,
) -> list[Found]:  # fmt: skip
    """The `top` nearest images of a gallery for each image of a file, folder or pattern.

    `index` is the file of an approximate index, made where there is none, see `approximate_index`. Raises UserError for
    a gallery of another model, an image that cannot be read, and a `top` beyond what there is to find.
    """
    network = load_retriever(model, device=device)
    check_model(gallery, network, model)
    paths = list(find_images(source))
    queries = embed_files(network, paths, workers=workers)
    if queries.failed:
        raise UserError(queries.failed[0])
    built = exact_index(gallery.embeddings()) if index is None else kept_index(gallery, Path(index))
    found = nearest(built, queries.vectors, own_places(paths, gallery), top=top)
    known = set(gallery.classes())
    labels = [next((part for part in reversed(path.resolve().parts[:-1]) if part in known), None) for path in paths]
    return [Found(*parts) for parts in zip(paths, labels, found, strict=True)]


def own_places(paths: list[Path], gallery: Gallery) -> list[int | None]:
    """The place in the gallery of each file, None for one that it does not hold; a link counts as what it leads to."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(gallery.names):
        places.setdefault(name.rpartition("/")[2], []).append(place)
    own: list[int | None] = []
    for path in paths:
        near = [place for name in (path.name, path.resolve().name) for place in places.get(name, [])]
        own.append(next((place for place in near if same_file(gallery.root / gallery.names[place], path)), None))
    return own


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file; a missing one leads nowhere."""
    return one.exists() and one.samefile(other)


def rows(found: list[Found], gallery: Gallery) -> list[dict[str, Any]]:
    """What was found, for JSON; `right` is whether a neighbour has the query's class, None where that is not known."""
    classes = gallery.classes()
    return [
        {"query": str(one.path), "class": one.label, "found": [
            {"image": str(gallery.root / gallery.names[place]), "score": round(score, 4), "class": classes[place],
             "right": None if one.label is None else classes[place] == one.label}
            for place, score in one.neighbours
        ]}
        for one in found
    ]  # fmt: skip


def nearest(index: Any, queries: Vectors, own: list[int | None], *, top: int) -> list[list[Neighbour]]:
    """The `top` nearest of each query (Q, C) but for its own place in the gallery; fewer where an index misses some."""
    itself = any(place is not None for place in own)
    most = index.ntotal - itself
    if not 1 <= top <= most:
        raise UserError(f"top is {top}, but there are {most} images to find; choose 1 ... {most}")
    scores, ids = index.search(queries, top + itself)
    return [
        [Neighbour(int(i), float(s)) for i, s in zip(*row, strict=True) if i >= 0 and i != place][:top]
        for place, *row in zip(own, ids, scores, strict=True)
    ]  # fmt: skip


def need_faiss() -> ModuleType:
    """The faiss library, or a UserError that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("search needs faiss, which is not installed; pip install segvit[retrieve]") from error
    return faiss


def exact_index(vectors: Vectors) -> Any:
    """An index that compares a query with every vector (M, C)."""
    index = need_faiss().IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def approximate_index(vectors: Vectors) -> Any:
    """An index for large galleries: vectors (M, C) in about sqrt(M) lists, of which a query looks into a sixteenth.

    A query is compared with the lists' centres and a sixteenth of the vectors, and misses neighbours in other lists.
    """
    faiss = need_faiss()
    count, dim = vectors.shape
    lists = max(1, min(round(count**0.5), count // TRAINED))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True  # centres of length 1 too
    index.cp.min_points_per_centroid = 1  # else faiss prints about galleries that are too small for an index
    index.train(vectors)
    index.add(vectors)
    index.nprobe = max(1, round(lists * PROBED))
    return index


def kept_index(gallery: Gallery, path: Path) -> Any:
    """The approximate index of a gallery from its file, which is written where there is none.

    Raises UserError for the index of another gallery and a file that is none.
    """
    faiss = need_faiss()
    if not path.exists():
        index = approximate_index(gallery.embeddings())
        with open_atomic(path) as file:
            np.savez(file, index=faiss.serialize_index(index), digest=np.array(gallery.digest))
        return index
    try:
        with np.load(path, allow_pickle=False) as stored:
            made, data = str(stored["digest"]), stored["index"]
    except BROKEN as error:
        raise UserError(f"{path} cannot be read as an index ({error}); delete it and search again") from error
    if made != gallery.digest:
        raise UserError(f"{path} is the index of another gallery than {gallery.path}; delete it or name another file")
    return faiss.deserialize_index(data)
