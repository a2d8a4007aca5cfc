"""A secret for each fleet of the tests."""

from __future__ import annotations

import hashlib
from pathlib import Path


def secret_of(place: Path) -> str:
    """The secret of those who share ``place``: of tests with the same one multicast DNS would make one fleet."""
    return hashlib.sha256(str(place).encode()).hexdigest()
