"""``make mutants`` takes defences away that are there: it is run seldom, and the code moves on."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.test.rpartition("::")[2])
def test_what_is_to_be_taken_away_is_there_once_and_so_is_its_test(mutant: Mutant) -> None:
    assert (ROOT / "httpx_p2pcache" / mutant.file).read_text().count(mutant.old) == 1
    file, _, test = mutant.test.partition("::")
    text = (ROOT / "tests" / file).read_text()
    assert not test or f"def {test.partition('[')[0]}(" in text
