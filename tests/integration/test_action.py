"""The Action's scripts under plain Node, with the runner's environment files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Runner

from httpx_p2pcache.testing import Origin, made_up

pytest.importorskip("libp2p")

pytestmark = [pytest.mark.p2p, pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")]

ROOT = Path(__file__).parents[2]
SECRET = "a-secret%of the\nfleet"


class Job:
    """A job on a runner: its environment files, and the Action's two scripts."""

    def __init__(self, directory: Path) -> None:
        self.runner = Runner(directory / "store", directory / "registry")
        del self.runner.environment["CACHE_SHARED_SECRET"]
        self._directory = directory
        for name in ("ENV", "OUTPUT", "STATE", "STEP_SUMMARY"):
            (directory / name).touch()
            self.runner.environment[f"GITHUB_{name}"] = str(directory / name)

    def script(self, name: str, **inputs: str) -> str:
        """What a script prints; it is to end well."""
        given = {"install": "false", "python": sys.executable, **inputs}
        environment = self.runner.environment | {f"INPUT_{k.upper()}": v for k, v in given.items()}
        done = subprocess.run(
            ["node", str(ROOT / ".github" / "action" / f"{name}.js")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert (done.returncode, done.stderr) == (0, "")
        # As the runner does it: what was exported is there for the next step, what was saved for the script itself.
        self.runner.environment |= self.file("ENV") | {f"STATE_{k}": v for k, v in self.file("STATE").items()}
        return done.stdout

    def file(self, name: str) -> dict[str, str]:
        """An environment file, read as the runner reads it."""
        text = (self._directory / name).read_text()
        return {match[1]: match[3] for match in re.finditer(r"^(\w[\w-]*)<<(\S+)\n(.*?)\n\2$", text, re.M | re.S)}

    @property
    def summary(self) -> str:
        return (self._directory / "STEP_SUMMARY").read_text()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.runner.stop()


def test_a_job_shares_and_ends_with_a_summary(job: Job) -> None:
    said = job.script("main", secret=SECRET)
    assert "::add-mask::a-secret%25of the%0Afleet\n" in said
    exported, outputs = job.file("ENV"), job.file("OUTPUT")
    assert exported["CACHE_SHARED_SECRET"] == SECRET
    assert Path(exported["CACHE_DIR"]) == job.runner.directory
    assert outputs["peer_multiaddr"].endswith(f"/p2p/{outputs['peer_id']}")
    assert Path(outputs["door"]).is_socket()
    with Origin(made_up(3)) as origin:
        for _ in range(2):
            job.runner.step(*(origin.url + target for target in origin.resources))
    job.script("post")
    assert "**3 API calls saved** of 6: 50% hits, 3 calls that counted" in job.summary
    assert "pie showData" in job.summary
    assert "| `GET 127.0.0.1:" in job.summary
    assert job.runner.status() == {}


def test_a_daemon_that_was_there_is_left_to_the_job_that_started_it(job: Job) -> None:
    job.runner.environment["CACHE_SHARED_SECRET"] = SECRET
    job.runner.p2pcache("init")
    job.script("main", secret=SECRET)
    job.script("post")
    assert job.runner.status()["pid"]


def test_what_goes_wrong_is_a_warning_and_the_job_goes_on(job: Job) -> None:
    said = job.script("main", secret=SECRET, port="not a port")
    assert "::warning title=httpx-p2pcache::the daemon did not start: " in said
    assert "CACHE_LISTEN_PORT must be a port number" in said
    assert job.script("post") == ""
    assert "could not install" in job.script("main", secret=SECRET, install="./not-there")


def test_every_input_that_is_read_is_declared_and_the_reverse() -> None:
    declared = (ROOT / "action.yml").read_text().partition("inputs:")[2].partition("outputs:")[0]
    source = (ROOT / ".github" / "action" / "main.js").read_text()
    table = source.partition("VARIABLES = {")[2].partition("}")[0]
    read = set(re.findall(r"input\('([a-z-]+)'\)", source)) | set(re.findall(r"^  '?([a-z-]+)'?:", table, re.M))
    assert set(re.findall(r"^  ([a-z-]+):$", declared, re.M)) == read


@pytest.mark.parametrize(("name", "port"), [("amd64", "9000"), ("arm64", "9001")])
def test_the_examples_use_the_ports_that_users_know(name: str, port: str) -> None:
    assert f"CACHE_LISTEN_PORT: '{port}'" in (ROOT / ".github" / "workflows" / f"{name}-ci.yml").read_text()
