"""The commands in the documents are run as they stand there, against the stand-in for GitHub."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import TOKEN, Runner

from httpx_p2pcache.node.discovery import Finder
from httpx_p2pcache.testing import Origin, Resource

pytest.importorskip("libp2p")
pytestmark = pytest.mark.p2p

ROOT = Path(__file__).parents[2]
# What sets up a machine, takes minutes, or is a test of its own (gh: test_door)
NOT_HERE = ("make demo", "make test", "make setup", "pip install", "gh ")


def blocks(page: str) -> list[str]:
    return re.findall(r"```(?:sh|console)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def lines(page: str) -> list[str]:
    found = [line.removeprefix("$ ") for block in blocks(page) for line in block.splitlines()]
    return [line for line in found if line.strip() and not line.startswith(NOT_HERE)]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(tmp_path / "store", tmp_path / "peers")
    yield runner
    runner.stop()


def ran(script: str, runner: Runner, **more: str) -> str:
    environment = runner.environment | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | more
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", ["docs/quickstart.md", "docs/command-line.md"])
def test_the_commands_of_a_page_work_one_after_another(page: str, runner: Runner) -> None:
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a secret with")
    said = lines(page)
    assert [line for line in said if line.startswith("p2pcache init")]
    assert "peer" in ran("\n".join(said), runner)
    assert not runner.status(), "it was to be stopped"


def test_the_doors_commands_work(runner: Runner, origin: Origin) -> None:
    if not shutil.which("curl"):
        pytest.skip("no curl")
    script = "\n".join(lines("docs/clients.md")).replace("api.github.com", origin.netloc)
    more = {"CACHE_GITHUB_HOSTS": origin.netloc, "GH_TOKEN": TOKEN}
    assert ran(script, runner, **more).count(origin.resources["/repos/octo-org/repo-1"].body.decode()[:40]) >= 1


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/statistics.md", "docs/troubleshooting.md"])
def test_the_programs_of_a_page_run(page: str, runner: Runner, origin: Origin) -> None:
    origin.resources["/zen"] = Resource(b"Keep it logically awesome.")
    for program in programs(page):
        process = runner.start(program.replace("https://api.github.com", origin.url))
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, program
        assert ("p2pcache; fwd=miss; stored" in said) is ("/zen" in program)


def test_the_way_of_finding_that_is_the_example_finds(origin: Origin) -> None:
    (program,) = programs("docs/extending.md")
    names: dict[str, Any] = {}
    exec(program, names)
    origin.resources["/peers"] = Resource(
        b"/ip4/10.0.0.1/tcp/9100/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN\n\n"
    )
    finder: Finder = names["Listed"](f"{origin.url}/peers")
    (found,) = finder.find()
    assert (found.peer_id, found.addresses) == (b"", ("/ip4/10.0.0.1/tcp/9100",))
    with pytest.raises(OSError, match="404"):
        names["Listed"](f"{origin.url}/elsewhere").find()


def test_every_program_is_run_by_a_test() -> None:
    pages = {"README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))}
    here = {"README.md", "docs/quickstart.md", "docs/statistics.md", "docs/troubleshooting.md", "docs/extending.md"}
    assert {page for page in pages if programs(page)} == here | {"docs/clients.md"}  # of which test_clients runs all


def test_every_shell_block_is_run_by_a_test() -> None:
    pages = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    run_here = {"docs/quickstart.md", "docs/command-line.md", "docs/clients.md"}
    others = {page: lines(page) for page in pages if page not in run_here and lines(page)}
    assert others.pop("docs/CONTRIBUTING.md") == ["make help       # all the rest"]
    assert list(others) == ["docs/finding-peers.md"], "a node in the foreground, as in test_finding"


def test_help_of_make_lists_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [target for target in targets if not re.search(rf"^{target}\b", done.stdout, re.MULTILINE)] == []
