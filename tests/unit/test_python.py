"""What the oldest Python that is supported does not know, and neither ruff nor mypy sees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import httpx_p2pcache

MODULES = sorted(Path(httpx_p2pcache.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_no_named_tuple_has_another_base(module: Path) -> None:
    """Python 3.10 cannot even import a class that is a NamedTuple and generic."""
    classes = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.ClassDef)]
    named = [
        one for one in classes if any(isinstance(base, ast.Name) and base.id == "NamedTuple" for base in one.bases)
    ]
    assert [one.name for one in named if len(one.bases) > 1] == []
