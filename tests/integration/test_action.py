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
        self.directory = directory
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
            cwd=self.directory,
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
        text = (self.directory / name).read_text()
        return {match[1]: match[3] for match in re.finditer(r"^(\w[\w-]*)<<(\S+)\n(.*?)\n\2$", text, re.M | re.S)}

    @property
    def summary(self) -> str:
        return (self.directory / "STEP_SUMMARY").read_text()


def _action() -> str:
    return (ROOT / "action.yml").read_text()


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


def test_the_steps_after_a_daemon_that_could_not_start_ask_the_origin(job: Job) -> None:
    job.script("main", secret=SECRET, port="not a port")
    with Origin(made_up(1)) as origin:
        assert job.runner.step(*(origin.url + target for target in origin.resources))["sources"] == ["origin"]


@pytest.mark.parametrize("inputs", [{"python": "./no-python"}, {"cache-dir": "ENV/is-a-file"}])
def test_whatever_an_input_says_the_scripts_end_well(job: Job, inputs: dict[str, str]) -> None:
    said = job.script("main", secret=SECRET, **inputs)
    assert len(re.findall(r"^::warning title=httpx-p2pcache::\S.*$", said, re.M)) == 1
    assert [line for line in said.splitlines() if not line.startswith(("::warning", "::add-mask"))] == []
    assert job.script("post") == ""
    assert job.summary == ""


def test_what_is_given_is_exported_as_it_is_for_the_steps_to_come(job: Job) -> None:
    odd = "100%25 of\nCACHE_NODE=none\nend-0\nCACHE_NODE<<end"
    given = {
        "fleet": "another fleet%",
        "peer-registry": str(job.directory / "peers"),
        "cache-dir": "in/the workspace",
        "bootstrap-peers": "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDJH6fPL6tatf6JdjxLAP3PkVHLymxaRkWLBXbZhPVaxt",
        "port": "0",
    }
    job.runner.directory = job.directory / "in" / "the workspace"
    said = job.script("main", secret=odd, **given)
    assert job.file("ENV") == {
        "CACHE_SHARED_SECRET": odd,
        "CACHE_FLEET": "another fleet%",
        "CACHE_PEER_REGISTRY": given["peer-registry"],
        "CACHE_DIR": str(job.runner.directory),
        "CACHE_BOOTSTRAP_PEERS": given["bootstrap-peers"],
        "CACHE_LISTEN_PORT": "0",
        "CACHE_ENABLE_P2P": "true",
    }
    assert job.runner.status()["fleet"] == "another fleet%"
    job.script("post")
    masked = "::add-mask::100%2525 of%0ACACHE_NODE=none%0Aend-0%0ACACHE_NODE<<end\n"
    assert said.startswith(masked)  # before anything else could say it
    told = [said.replace(masked, ""), job.summary, *((job.directory / n).read_text() for n in ("OUTPUT", "STATE"))]
    assert [text for text in told if "100%" in text] == []


def test_without_a_secret_there_is_a_cache_for_the_job_alone(job: Job) -> None:
    said = job.script("main")
    assert "::add-mask::" not in said
    assert "null" not in said
    outputs = job.file("OUTPUT")
    assert (outputs["peer_id"], outputs["peer_multiaddr"], outputs["artifact"]) == ("", "", "")
    assert outputs["door"] == job.runner.status()["door"]


def test_two_jobs_of_which_one_is_told_of_the_other_share(job: Job, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Job(tmp_path / "other")
    try:
        job.script("main", secret=SECRET)
        address = job.file("OUTPUT")["peer_multiaddr"]
        said = other.script("main", **{"secret": SECRET, "bootstrap-peers": address})
        assert "with 1 peers" in said
        other.script("post")
        assert "No requests were made through it" in other.summary
    finally:
        other.runner.stop()


def test_a_daemon_that_has_gone_before_the_end_leaves_its_summary(job: Job) -> None:
    job.script("main", secret=SECRET)
    with Origin(made_up(1)) as origin:
        job.runner.step(*(origin.url + target for target in origin.resources))
    job.runner.stop()
    assert "::warning" not in job.script("post")
    assert "**0 API calls saved** of 1" in job.summary


def test_without_the_runners_files_nothing_fails(job: Job) -> None:
    for name in ("ENV", "OUTPUT", "STATE", "STEP_SUMMARY"):
        del job.runner.environment[f"GITHUB_{name}"]
    job.script("main", secret=SECRET)
    (used,) = (path for path in (job.runner.directory / "jobs").iterdir() if path.name != "started")
    job.runner.environment |= {"STATE_job": str(used), "STATE_python": sys.executable}
    assert "the daemon has ended" in job.script("post")


def another_job(job: Job, directory: Path) -> Job:
    """On the same machine, by the same user."""
    directory.mkdir()
    other = Job(directory)
    other.runner.environment["CACHE_DIR"] = str(job.runner.directory)
    return other


def test_of_two_jobs_of_one_machine_the_last_one_ends_the_daemon(job: Job, tmp_path: Path) -> None:
    other = another_job(job, tmp_path / "other")
    job.script("main", secret=SECRET)
    other.script("main", secret=SECRET)
    assert "ended" not in job.script("post")
    assert Path(other.file("OUTPUT")["door"]).is_socket()
    assert job.runner.status()["pid"]
    assert "the daemon has ended" in other.script("post")
    assert job.runner.status() == {}


def test_a_job_of_another_fleet_does_not_end_the_daemon_of_one_that_goes_on(job: Job, tmp_path: Path) -> None:
    other = another_job(job, tmp_path / "other")
    other.runner.environment["RUNNER_TEMP"] = str(tmp_path / "other")
    job.script("main", secret=SECRET)
    pid = job.runner.status()["pid"]
    try:
        assert "sharing as" in other.script("main", secret="another secret, as long as that one")
        assert other.file("ENV")["CACHE_DIR"] == str(tmp_path / "other" / "p2pcache")
        assert job.runner.status()["pid"] == pid
        assert "the daemon has ended" in other.script("post")
    finally:
        other.runner.directory = tmp_path / "other" / "p2pcache"
        other.runner.stop()
    assert job.runner.status()["pid"] == pid
    assert "the daemon has ended" in job.script("post")


def test_the_outputs_are_there_though_nobody_is_waited_for_and_so_is_the_command(job: Job, tmp_path: Path) -> None:
    (tmp_path / "PATH").touch()
    job.runner.environment["GITHUB_PATH"] = str(tmp_path / "PATH")
    said = job.script("main", secret=SECRET, wait="0")
    assert "sharing as null" not in said
    assert job.file("OUTPUT")["peer_id"]
    assert (Path((tmp_path / "PATH").read_text().strip()) / "p2pcache").exists()
    assert job.runner.status()["ends_after_idle_seconds"] >= 6 * 3600


@pytest.mark.parametrize("wait", ["a while", "900", "-1"])
def test_a_wait_that_is_none_is_named_and_the_cache_is_used_all_the_same(job: Job, wait: str) -> None:
    said = job.script("main", secret=SECRET, wait=wait)
    assert f"not {wait}: 10 is taken" in said
    assert "sharing as" in said


def test_sharing_can_be_switched_off_for_a_whole_workflow(job: Job) -> None:
    job.runner.environment["CACHE_ENABLE_P2P"] = "false"
    assert "a cache for this job alone" in job.script("main", secret=SECRET)
    assert job.file("ENV")["CACHE_ENABLE_P2P"] == "false"


@pytest.mark.skipif(shutil.which("gh") is None, reason="gh is not installed")
def test_gh_is_led_through_the_door_and_back_to_where_it_was(job: Job) -> None:
    job.runner.environment["GH_CONFIG_DIR"] = str(job.directory / "gh")

    def gh(*arguments: str) -> str:
        command = ["gh", "config", *arguments]
        done = subprocess.run(command, env=job.runner.environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    gh("set", "http_unix_socket", "/a/socket/of/the/user")
    job.script("main", secret=SECRET, gh="true")
    assert gh("get", "http_unix_socket") == job.file("OUTPUT")["door"]
    job.script("post")
    assert gh("get", "http_unix_socket") == "/a/socket/of/the/user"


def test_every_input_that_is_read_is_declared_and_the_reverse() -> None:
    declared = _action().partition("inputs:")[2].partition("outputs:")[0]
    source = (ROOT / ".github" / "action" / "main.js").read_text()
    table = source.partition("VARIABLES = {")[2].partition("}")[0]
    read = set(re.findall(r"input\('([a-z-]+)'\)", source)) | set(re.findall(r"^  '?([a-z-]+)'?:", table, re.M))
    assert set(re.findall(r"^  ([a-z-]+):$", declared, re.M)) == read


def test_every_output_that_is_declared_is_set_and_the_reverse() -> None:
    declared = _action().partition("outputs:")[2].partition("runs:")[0]
    source = (ROOT / ".github" / "action" / "main.js").read_text()
    assert set(re.findall(r"^  (\w+):$", declared, re.M)) == set(re.findall(r"setOutput\('(\w+)'", source))


def test_every_input_and_output_is_documented() -> None:
    documented = (ROOT / "docs" / "github-actions.md").read_text()
    names = re.findall(r"^  ([a-z_-]+):$", _action().partition("inputs:")[2].partition("runs:")[0], re.M)
    assert len(names) > 10
    assert [name for name in names if f"`{name}`" not in documented] == []


def test_the_defaults_that_are_declared_are_those_that_are_taken() -> None:
    """Where a script is run without them, as an older runner may."""
    declared = dict(re.findall(r"^  ([a-z-]+):\n(?:    .*\n)*?    default: '?([^'\n]*)'?$", _action(), re.M))
    source = (ROOT / ".github" / "action" / "main.js").read_text()
    fallbacks = dict(re.findall(r"input\('([a-z-]+)'\) \|\| '([^']*)'", source))
    assert fallbacks == {name: value for name, value in declared.items() if name in fallbacks}
    assert set(fallbacks) == {"python", "wait"}


def test_the_scripts_that_it_names_are_there() -> None:
    scripts = re.findall(r"^  (main|post): (\S+)$", _action(), re.M)
    assert [(kind, (ROOT / path).is_file()) for kind, path in scripts] == [("main", True), ("post", True)]
    assert re.search(r"^  using: node2\d$", _action(), re.M)
    assert re.search(r"^  post-if: always\(\)$", _action(), re.M)


@pytest.mark.parametrize(("name", "port"), [("amd64", "9000"), ("arm64", "9001")])
def test_the_examples_use_the_ports_that_users_know(name: str, port: str) -> None:
    assert f"CACHE_LISTEN_PORT: '{port}'" in (ROOT / ".github" / "workflows" / f"{name}-ci.yml").read_text()
