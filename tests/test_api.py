"""The public names."""

import pytest

import segvit


def test_all_is_what_resolves():
    assert set(segvit.__all__) == segvit._WHERE.keys()
    assert len(set(segvit.__all__)) == len(segvit.__all__)
    # Constants, then classes, then functions, each in the alphabet.
    order = sorted(segvit.__all__, key=lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name))
    assert segvit.__all__ == order


@pytest.mark.parametrize("name", segvit.__all__)
def test_every_name_resolves_and_says_what_it_is(name):
    value = getattr(segvit, name)
    assert name == "MODELS" or (value.__doc__ and value.__module__.startswith("segvit."))


def test_dir_and_version():
    assert {*segvit.__all__, "__version__"} <= set(dir(segvit))
    assert segvit.__version__.count(".") == 2


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'segvit' has no attribute 'Predicter'"):
        segvit.Predicter  # noqa: B018
    with pytest.raises(ImportError):
        exec("from segvit import nothing_like_this")


def test_star_import_gives_exactly_the_names():
    names = {}
    exec("from segvit import *", names)
    assert names.keys() - {"__builtins__"} == set(segvit.__all__)
