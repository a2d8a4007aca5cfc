"""What the documents say is what the code does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from httpx_p2pcache.settings import describe
from httpx_p2pcache.stats import COUNTERS, summary

ROOT = Path(__file__).parents[2]
MADE = ("configuration.md", "options.md", "index.md")  # by docs/site/hooks.py
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
    targets = re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists() and target not in MADE] == []


def test_the_site_is_made_without_a_warning(tmp_path: Path) -> None:
    """Links, anchors, and pages that no menu leads to are warned about, and a warning is an error."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "-f", ROOT / "docs" / "site" / "mkdocs.yml"]
    done = subprocess.run([*command, "-d", tmp_path], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "CACHE_LISTEN_PORT" in (tmp_path / "configuration.html").read_text()
    assert "--watch" in (tmp_path / "options.html").read_text()
    assert "P2PCacheTransport" in (tmp_path / "api.html").read_text()


def test_every_test_that_the_security_page_names_is_there() -> None:
    names = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text()))
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 30
    assert [name for name in sorted(names) if f"def {name}(" not in tests] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python_and_name_what_there_is(page: Path) -> None:
    import httpx_p2pcache

    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "httpx_p2pcache":
                assert [alias.name for alias in node.names if not hasattr(httpx_p2pcache, alias.name)] == []


def test_every_command_is_described_with_its_exit_status() -> None:
    app = pytest.importorskip("httpx_p2pcache.cli.app").app
    page = (ROOT / "docs" / "command-line.md").read_text()
    for command in app.registered_commands:
        row = next(line for line in page.splitlines() if line.startswith(f"| `p2pcache {command.callback.__name__}"))
        assert row.rstrip("| ").rpartition("|")[2].strip().startswith("0") or "as `demo`" in row


def test_every_input_of_the_action_is_described() -> None:
    declared = (ROOT / "action.yml").read_text().partition("inputs:")[2].partition("outputs:")[0]
    names = re.findall(r"^  ([a-z-]+):$", declared, re.MULTILINE)
    page = (ROOT / "docs" / "github-actions.md").read_text()
    assert [name for name in names if f"| `{name}` |" not in page] == []
