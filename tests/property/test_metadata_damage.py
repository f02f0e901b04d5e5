"""Random damage of a pool's metadata: check finds what changes its meaning, repair returns what is intact, and is honest.

The seeds are those of tools/damage; a seed that fails is replayed by `tools/damage --first SEED --cases 1`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from metadata_damage.judgement import Verdict, judge
from metadata_damage.specimen import specimen

from tests.fakes.metadata_audit import audit

DEFAULT_SEEDS = range(40)
# Of seeds nobody had looked at before: a leaf of mappings for the list of roots; a child lost, and the records; ...
FOUND_SEEDS = (1070, 1202, 1297, 1446)
DEEP_SEEDS = range(1000)


def keeps_the_promise(verdict: Verdict) -> bool:
    found = verdict.found or verdict.meaning != "changed"
    return found and verdict.returned == verdict.undamaged and verdict.source_kept


def test_the_specimen_is_sound():
    made = specimen()
    assert audit(made.image).mappings == made.contents
    assert set(made.nodes) == {1, 2, 3, 11, 12}
    assert made.nodes[1] & made.nodes[11]


@pytest.mark.parametrize("seed", [*DEFAULT_SEEDS, *FOUND_SEEDS])
def test_damage(seed: int):
    verdict = judge(specimen(), seed)
    assert keeps_the_promise(verdict), verdict
    assert verdict.honest, verdict


@pytest.mark.deep
def test_a_thousand_damages():
    broken = [verdict for seed in DEEP_SEEDS if not keeps_the_promise(verdict := judge(specimen(), seed))]
    assert not broken
