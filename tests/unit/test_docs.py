"""What the documents say is what the code does."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from httpx_p2pcache.settings import describe
from httpx_p2pcache.stats import COUNTERS, summary

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_lists_every_setting_as_it_is() -> None:
    rows = [f"| `{name}` | {f'`{default}`' if default else ''} | {title} |" for name, default, title in describe()]
    readme = (ROOT / "README.md").read_text()
    assert [row for row in rows if row not in readme] == []


def test_every_figure_is_defined() -> None:
    page = (ROOT / "docs" / "statistics.md").read_text()
    figures = summary(dict.fromkeys(COUNTERS, 0))
    assert [name for name in figures if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python_and_name_what_there_is(page: Path) -> None:
    import httpx_p2pcache

    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "httpx_p2pcache":
                assert [alias.name for alias in node.names if not hasattr(httpx_p2pcache, alias.name)] == []
