"""Damaged annotation files: each is refused by an AnnotationError that names a file, or read whole."""

import tempfile
from collections import Counter
from pathlib import Path

import annotation_fuzz as fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempme_vl.data.files import AnnotationError

FINE = {"read", "refused"}


@pytest.fixture(scope="module")
def places():
    """For each case a folder with its files, and what is read of them."""
    memory = Path("/dev/shm")  # files are written thousands of times
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        found = {}
        for number, (name, case) in enumerate(fuzz.CASES.items()):
            place = Path(folder) / str(number)
            place.mkdir()
            fuzz.write(place, case.files)
            found[name] = place, case.read(place)
        yield found


def become_of(places, name, seed):
    folder, whole = places[name]
    return fuzz.tried(fuzz.CASES[name], folder, seed, AnnotationError, whole)


@settings(derandomize=True, max_examples=400, deadline=None, database=None)
@given(name=st.sampled_from(list(fuzz.CASES)), seed=st.integers(0, 2**32 - 1))
def test_damaged_files_are_refused_by_name_or_read_whole(places, name, seed):
    assert become_of(places, name, seed) in FINE


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.CASES)
def test_a_thousand_damaged_files_of_each_layout(places, name):
    counts = Counter(become_of(places, name, seed) for seed in range(1000))
    assert set(counts) == FINE, counts
    assert min(counts.values()) >= 100, "too few of one kind: this would show little"
