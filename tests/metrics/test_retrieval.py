"""Recall@K: by hand, against sorting, chunks, ties, galleries and bad input."""

import numpy as np
import pytest

from segvit.contracts import UserError
from segvit.metrics.retrieval import recall_at_k, wrong_ahead


def blobs(count: int = 60, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(count) % classes)
    centres = generator.normal(size=(classes, 8))
    return centres[labels] + generator.normal(size=(count, 8)), labels


def at(*degrees: float) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def test_by_hand():
    embeddings, labels = at(0, 10, 25, 60), np.array([0, 1, 0, 1])
    assert wrong_ahead(embeddings, labels).tolist() == [1, 2, 1, 1]
    assert recall_at_k(embeddings, labels, ks=(1, 2, 3)) == {1: 0.0, 2: 0.75, 3: 1.0}


def test_equals_sorting_and_lengths_do_not_matter():
    embeddings, labels = blobs()
    lengths = np.random.default_rng(1).uniform(0.1, 9, (len(labels), 1))
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1)
    expected = {k: float(np.mean((labels[order[:, :k]] == labels[:, None]).any(1))) for k in (1, 2, 4, 8)}
    assert 0 < expected[1] < expected[4] < 1
    assert recall_at_k(embeddings * lengths, labels) == expected


@pytest.mark.parametrize("chunk", [1, 7, 60, 1000])
def test_chunks_change_nothing(chunk):
    embeddings, labels = blobs()
    assert np.array_equal(wrong_ahead(embeddings, labels, chunk=chunk), wrong_ahead(embeddings, labels))


def test_a_collapsed_network_finds_nothing():
    labels = np.array([0, 0, 1, 1])
    assert recall_at_k(np.ones((4, 3)), labels, ks=(1, 2, 3)) == {1: 0.0, 2: 0.0, 3: 1.0}


def test_a_gallery_keeps_the_equal_image():
    embeddings, labels = at(0, 10, 25, 60), np.array([0, 1, 0, 1])
    assert recall_at_k(embeddings, labels, ks=(1,), gallery=(embeddings, labels)) == {1: 1.0}
    assert recall_at_k(at(12), np.array([0]), ks=(1, 2), gallery=(embeddings, labels)) == {1: 0.0, 2: 1.0}


@pytest.mark.parametrize(
    ("embeddings", "labels", "options", "message"),
    [
        (at(0, 10, 20), np.array([0, 0, 1]), {"ks": (1,)}, "class 1 .*no other image"),
        (at(0, 10), np.array([0, 0]), {"ks": (2,)}, "there are 1 images to find"),
        (at(0, 10), np.array([0, 0]), {"ks": (0,)}, "choose K in"),
        (at(0, 10), np.array([0, 0]), {"ks": (1,), "chunk": 0}, "chunk is 0"),
        (at(0, 10), np.array([0]), {"ks": (1,)}, r"labels \(1,\)"),
        (np.zeros((2, 3)), np.array([0, 0]), {"ks": (1,)}, "length 0"),
        (np.full((2, 3), np.nan), np.array([0, 0]), {"ks": (1,)}, "length nan"),
        (at(0), np.array([0]), {"ks": (1,), "gallery": (np.ones((2, 3)), np.array([0, 0]))}, "gallery 3"),
    ],
)
def test_bad_input(embeddings, labels, options, message):
    with pytest.raises(UserError, match=message):
        recall_at_k(embeddings, labels, **options)
