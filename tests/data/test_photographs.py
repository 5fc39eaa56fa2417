"""The photographs that come with the project."""

import numpy as np
import pytest

from tests.conftest import ROOT
from vitbench.base import paths
from vitbench.base.errors import InputError
from vitbench.data.splits import load_data


@pytest.fixture(scope="module")
def photographs():
    return load_data("photographs")


def test_each_class_has_as_many_in_each_split(photographs):
    for split, count in (("train", 5_000), ("val", 1_000), ("test", 3_000)):
        assert np.bincount(getattr(photographs, split).labels).tolist() == [count // 10] * 10
    assert photographs.image_size == (32, 32)
    assert photographs.classes[3] == "cat"


def test_no_image_is_in_two_splits(photographs):
    pixels = [getattr(photographs, name).array for name in ("train", "val", "test")]
    seen = [{image.tobytes() for image in split} for split in pixels]
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_they_take_at_most_three_megabytes():
    assert sum(file.stat().st_size for file in (ROOT / "data" / "photographs").iterdir()) <= 3e6


def test_an_installation_without_them_says_what_to_give(monkeypatch):
    monkeypatch.setattr(paths, "shipped", lambda name: None)
    with pytest.raises(InputError, match="give 'digits', a Hugging Face name, or a folder"):
        load_data("photographs")
