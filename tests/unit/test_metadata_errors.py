"""Every error prints a sentence, pickles, and keeps its fields."""

from __future__ import annotations

import pickle
from dataclasses import fields

import pytest

import metadata
from metadata import Damage, MetadataError

SAMPLES = {"int": 7, "str": "words", "bool": True, "Damage": Damage.CHECKSUM}
LEAVES = [
    value
    for value in vars(metadata).values()
    if isinstance(value, type) and issubclass(value, MetadataError) and value is not MetadataError
]


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_leaf(leaf):
    error = leaf(**{field.name: SAMPLES[field.type] for field in fields(leaf)})
    text = str(error)
    assert len(text) > 20
    assert "object at" not in text
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == text
    for field in fields(leaf):
        if isinstance(getattr(error, field.name), int) and field.type == "int":
            assert "7" in text


def test_all_leaves_are_exported():
    assert len(LEAVES) >= 16
