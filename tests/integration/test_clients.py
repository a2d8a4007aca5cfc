"""What docs/clients.md says, done: each recipe, and a fleet of five different clients."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from secret import secret_of

from httpx_p2pcache.testing import Origin, made_up

pytest.importorskip("libp2p")
requests = pytest.importorskip("requests")
github = pytest.importorskip("github")

pytestmark = pytest.mark.p2p

PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
RECIPES = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
PYTHON = [
    pytest.param(block, id=f"{name}-{number}".replace(" ", "-"))
    for name, text in RECIPES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
Environment = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with Origin(made_up(40), latency=0.05) as server:
        yield server


@pytest.fixture(scope="module")
def environment(origin: Origin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """``environment("a")``: of a runner that has a daemon, in the fleet of the test that asks."""
    root, started = tmp_path_factory.mktemp("clients"), {}
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("CACHE_", "GITHUB_", "GH_", "RUNNER_"))}

    def build(name: str, fleet: str = "recipes") -> dict[str, str]:
        if name not in started:
            ours = {
                "CACHE_DIR": str(root / name),
                "CACHE_PEER_REGISTRY": str(root / "registry"),
                "CACHE_SHARED_SECRET": secret_of(root),
                "CACHE_PUBLIC_BOOTSTRAP": "false",
                "CACHE_FLEET": fleet,
                "CACHE_LISTEN_HOST": "127.0.0.1",
                "CACHE_LISTEN_PORT": "0",
                "CACHE_GITHUB_HOSTS": origin.netloc,
                "NO_PROXY": "127.0.0.1",
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            }
            started[name] = kept | ours
            p2pcache(started[name], "init", "--port", "0")
        return started[name]

    yield build
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda runner: p2pcache(runner, "stop"), started.values()))


def p2pcache(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "httpx_p2pcache.cli", *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("recipe", PYTHON)
def test_each_python_recipe_works_as_printed(recipe: str, origin: Origin, environment: Environment) -> None:
    code = recipe.replace("https://api.github.com", origin.url).replace('"https://"', '"http://"')
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment("recipes"), capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stdout.split()[:1]) == (0, ["octo-org/repo-1"]), ran.stderr


def test_what_one_client_has_paid_for_serves_the_others_that_ask_for_the_same(
    origin: Origin, environment: Environment
) -> None:
    """Of httpx, httpx2, requests and PyGithub, whose requests select one representation."""
    runner = environment("one-after-another", "alone")
    origin.reset()
    for name in ("httpx", "httpx2", "requests", "PyGithub"):
        recipe = next(param.values[0] for param in PYTHON if str(param.id).startswith(f"{name}-0"))
        assert isinstance(recipe, str)
        code = recipe.replace("https://api.github.com", origin.url).replace('"https://"', '"http://"')
        subprocess.run([sys.executable, "-c", code], env=runner, check=True, capture_output=True, timeout=60)
    assert len(origin.calls) == 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_shell_recipe_for_curl_works_as_printed(origin: Origin, environment: Environment) -> None:
    block = next(b for b in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if "curl" in b)
    script = block.replace("http://api.github.com", origin.url)
    ran = subprocess.run(
        ["sh", "-euc", script], env=environment("recipes"), check=True, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.count('"full_name": "octo-org/repo-1"') == 2


@pytest.mark.skipif(shutil.which("npm") is None, reason="Node.js and npm are not installed")
def test_the_recipe_for_octokit_works_as_printed(origin: Origin, environment: Environment, tmp_path: Path) -> None:
    installed = subprocess.run(
        ["npm", "install", "--silent", "--no-audit", "--no-fund", "@octokit/core@7"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    if installed.returncode != 0:
        pytest.skip(f"npm could not install @octokit/core: {installed.stderr[-200:]}")
    (block,) = re.findall(r"```js\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "recipe.mjs").write_text(block)
    node = ["node", "recipe.mjs"]
    runner = environment("recipes")
    ran = subprocess.run(node, cwd=tmp_path, env=runner, capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "octo-org/repo-1", ran.stderr


def test_githubkit_cannot_be_imported_beside_this_hishel() -> None:
    """docs/clients.md says so; when this fails, there is a recipe to write."""
    pytest.importorskip("gidgethub")  # the clients that the tests are tried with are installed
    with pytest.raises(ImportError, match="hishel"):
        importlib.import_module("githubkit")


FLEET_OF_FIVE = {
    "httpx": """
        import httpx
        from httpx_p2pcache import P2PCacheTransport
        client = httpx.Client(transport=P2PCacheTransport(), headers={"Authorization": "Bearer one"}, timeout=30)
        get = lambda target: client.get(base + target).content
        """,
    "httpx-async": """
        import asyncio, httpx
        from httpx_p2pcache import P2PCacheTransport
        loop = asyncio.new_event_loop()
        client = httpx.AsyncClient(transport=P2PCacheTransport(), headers={"Authorization": "Bearer one"}, timeout=30)
        get = lambda target: loop.run_until_complete(client.get(base + target)).content
        """,
    "requests": """
        import requests
        from httpx_p2pcache.integrations.requests import P2PCacheAdapter
        session = requests.Session()
        session.mount("http://", P2PCacheAdapter())
        get = lambda target: session.get(base + target, headers={"Authorization": "Bearer one"}).content
        """,
    "PyGithub": """
        import github, json
        from httpx_p2pcache.integrations.pygithub import install
        install()
        api = github.Github(base_url=base, auth=github.Auth.Token("one"), seconds_between_requests=0)
        get = lambda target: json.dumps(api.get_repo(target.removeprefix("/repos/")).raw_data).encode()
        """,
    "curl": """
        import json, subprocess
        status = subprocess.check_output([sys.executable, "-m", "httpx_p2pcache.cli", "status", "--json"])
        door = json.loads(status)["door"]
        curl = ["curl", "--silent", "--compressed", "--unix-socket", door, "-H", "Authorization: token one"]
        get = lambda target: subprocess.check_output([*curl, base + target])
        """,
}
RUNNER = """
import sys, time
base, targets = sys.argv[1], sys.argv[2:]
{client}
print("ready", flush=True)
begin = float(sys.stdin.readline())
time.sleep(max(0, begin - time.time()))
for target in targets:
    get(target)
print("done", flush=True)
"""


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_five_different_clients_that_ask_for_the_same_in_the_same_second_pay_about_once(
    origin: Origin, environment: Environment
) -> None:
    with ThreadPoolExecutor(len(FLEET_OF_FIVE)) as pool:  # their daemons start side by side
        list(pool.map(lambda name: environment(name, "five"), FLEET_OF_FIVE))
    origin.reset()
    processes = []
    for name, client in FLEET_OF_FIVE.items():
        lines = "\n".join(line.strip() for line in client.strip().splitlines())
        command = [sys.executable, "-c", RUNNER.format(client=lines), origin.url, *origin.resources]
        processes.append(
            subprocess.Popen(
                command, env=environment(name, "five"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        begin = time.time() + 0.2
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{begin}\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert len(origin.resources) <= len(origin.calls) <= len(origin.resources) + 6
