from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from made import few, many, said

from httpx_p2pcache import P2PCacheError, Settings, SettingsError
from httpx_p2pcache.settings import can_be_guessed, describe, variable

SECONDS = "a number of seconds from 0 to 31536000"
SIZE = "a number of bytes, as 8388608 or 8MiB"

DEFAULTS = {
    "enable_p2p": True,
    "shared_secret": "",
    "previous_secret": "",
    "fleet": "default",
    "listen_port": 9100,
    "listen_host": "0.0.0.0",
    "announce_addrs": (),
    "bootstrap_peers": (),
    "public_bootstrap": True,
    "peer_registry": Path("~/.cache/github_cli/peers").expanduser(),
    "peer_ttl": 1800.0,
    "join_timeout": 0.0,
    "lookup_timeout": 0.25,
    "claim_timeout": 10.0,
    "default_ttl": 300.0,
    "stale_if_error": None,
    "dir": Path("~/.cache/github_cli").expanduser(),
    "encrypt_at_rest": False,
    "max_size": 1024**3,
    "max_body_size": 8 * 1024**2,
    "github_hosts": ("api.github.com",),
    "computed_validators": True,
    "shared_identity": False,
    "node": "auto",
    "artifacts": "run",
}
ADDRESSES = "multiaddrs, separated by commas, as /ip4/192.0.2.1/tcp/9100"
EXPECTED = {
    "enable_p2p": "true or false",
    "shared_secret": "text",
    "previous_secret": "text",
    "fleet": "a name",
    "listen_port": "a port number from 0 to 65535",
    "listen_host": "an IP address",
    "announce_addrs": ADDRESSES,
    "bootstrap_peers": ADDRESSES,
    "public_bootstrap": "true or false",
    "artifacts": "run, repository or none",
    "peer_registry": "a path",
    "peer_ttl": SECONDS,
    "join_timeout": SECONDS,
    "lookup_timeout": SECONDS,
    "claim_timeout": SECONDS,
    "default_ttl": SECONDS,
    "stale_if_error": SECONDS,
    "dir": "a path",
    "encrypt_at_rest": "true or false",
    "max_size": SIZE,
    "max_body_size": SIZE,
    "github_hosts": "hosts, separated by commas, as api.github.com or https://ghe.example:8443",
    "computed_validators": "true or false",
    "shared_identity": "true or false",
    "node": "auto, embedded, daemon or none",
}
SECRETS = ("shared_secret", "previous_secret")
FLAGS = ("enable_p2p", "public_bootstrap", "encrypt_at_rest", "computed_validators", "shared_identity")
DURATIONS = ("peer_ttl", "join_timeout", "lookup_timeout", "claim_timeout", "default_ttl", "stale_if_error")
SIZES = ("max_size", "max_body_size")

BAD_TEXTS = [
    *((name, text) for name in FLAGS for text in ("yes", "on", "2", "truee", "none")),
    *((name, text) for name in DURATIONS for text in ("soon", "-1", "nan", "inf", "31536001", "10s", "null")),
    *((name, text) for name in SIZES for text in ("-1", "8XB", "1.5GiB", "big", "MiB", "9" * 5000)),
    *(("listen_port", text) for text in ("abc", "-1", "65536", "80.5", "0x50")),
    *(("listen_host", text) for text in ("localhost", "999.1.1.1", "cafe", "1.2.3", ":::::")),
    *(("node", text) for text in ("AUTO", "true", "sidecar")),
    *(("artifacts", text) for text in ("all", "true", "Run")),
]


def test_the_defaults_are_the_documented_ones() -> None:
    assert {name: getattr(Settings(), name) for name in Settings.__struct_fields__} == DEFAULTS


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_env({}) == Settings()


@pytest.mark.parametrize(("name", "text"), BAD_TEXTS, ids=lambda value: value[:12])
def test_a_bad_value_in_the_environment_is_named_with_what_was_expected(name: str, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({variable(name): text})
    assert str(caught.value) == f"{variable(name)} must be {EXPECTED[name]}, not {text!r}"


@pytest.mark.parametrize("name", Settings.__struct_fields__)
def test_a_bad_value_in_code_is_named_with_what_was_expected(name: str) -> None:
    wrong = b"hush-hush"
    with pytest.raises(SettingsError) as caught:
        Settings(**{name: wrong})  # type: ignore[arg-type] # wrong on purpose
    shown = "the value it has" if name in SECRETS else repr(wrong)
    assert str(caught.value) == f"{variable(name)} must be {EXPECTED[name]}, not {shown}"


def test_a_settings_error_is_a_value_error_and_one_of_this_package() -> None:
    with pytest.raises(ValueError) as caught:
        Settings(listen_port=-1)
    assert isinstance(caught.value, P2PCacheError)


def test_sealing_what_is_stored_needs_a_secret() -> None:
    with pytest.raises(SettingsError, match="CACHE_ENCRYPT_AT_REST needs CACHE_SHARED_SECRET"):
        Settings(encrypt_at_rest=True)
    assert Settings(encrypt_at_rest=True, shared_secret="s").encrypt_at_rest


@pytest.mark.parametrize("secret", ["", "hunter2", "correct horse!!", "0" * 64, "abcabcabcabcabcabcabc"])
def test_a_secret_that_can_be_guessed_is_known_as_one(secret: str) -> None:
    assert can_be_guessed(secret)
    assert not can_be_guessed(secret + "9f86d081884c7d65")


def test_an_empty_fleet_is_refused() -> None:
    with pytest.raises(SettingsError, match="CACHE_FLEET must be a name, not ''"):
        Settings(fleet="")


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="listen_prot"):
        Settings.from_env({}, listen_prot=1)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("enable_p2p", "false", False),
        ("enable_p2p", "0", False),
        ("shared_identity", "TRUE", True),
        ("listen_port", "0", 0),
        ("listen_port", " 65535 ", 65535),
        ("listen_host", "127.0.0.1", "127.0.0.1"),
        ("listen_host", "::1", "::1"),
        ("bootstrap_peers", "/ip4/10.0.0.1, ,/dns/b/tcp/9100,", ("/ip4/10.0.0.1", "/dns/b/tcp/9100")),
        ("github_hosts", "ghe.example:8443", ("ghe.example:8443",)),
        ("github_hosts", ",", ()),
        ("stale_if_error", "0", 0.0),
        ("lookup_timeout", "0.5", 0.5),
        ("peer_ttl", "31536000", 31_536_000.0),
        ("dir", "~/elsewhere", Path("~/elsewhere").expanduser()),
        ("peer_registry", "/shared/peers", Path("/shared/peers")),
        ("max_body_size", "0", 0),
        ("node", "daemon", "daemon"),
        ("fleet", "octo-org", "octo-org"),
        ("previous_secret", "the old one", "the old one"),
    ],
)
def test_a_good_value_is_read_as_what_it_says(name: str, text: str, value: object) -> None:
    assert getattr(Settings.from_env({variable(name): text}), name) == value


@given(
    st.integers(0, 2**40),
    st.sampled_from([("", 1), ("KiB", 1024), ("mib", 1024**2), ("GiB", 1024**3), ("kB", 1000), ("MB", 10**6)]),
    st.sampled_from(["", " "]),
)
@few
def test_a_size_counts_in_its_unit(number: int, unit: tuple[str, int], space: str) -> None:
    written, factor = unit
    environ = {"CACHE_MAX_SIZE": f"{number}{space}{written}"}
    if number * factor <= 2**50:
        assert Settings.from_env(environ).max_size == number * factor
    else:
        with pytest.raises(SettingsError):
            Settings.from_env(environ)


@pytest.mark.parametrize("name", [n for n in Settings.__struct_fields__ if n != "fleet"])
def test_an_empty_variable_counts_as_one_that_is_not_set(name: str) -> None:
    assert Settings.from_env({variable(name): "  "}) == Settings()


@pytest.mark.parametrize(
    ("environ", "secret"),
    [
        ({"CACHE_SHARED_SECRET": "own", "GITHUB_TOKEN": "job", "GH_TOKEN": "user"}, "own"),
        ({"GITHUB_TOKEN": "job", "GH_TOKEN": "user"}, "job"),
        ({"GH_TOKEN": "user"}, "user"),
        ({"GITHUB_TOKEN": "", "GH_TOKEN": "user"}, "user"),
        ({}, ""),
    ],
)
def test_the_secret_is_the_first_that_is_set_of_its_three_variables(environ: dict[str, str], secret: str) -> None:
    assert Settings.from_env(environ).shared_secret == secret


@pytest.mark.parametrize("name", ["GITHUB_TOKEN", "GH_TOKEN"])
def test_a_blank_token_is_no_secret(name: str) -> None:
    assert Settings.from_env({name: " \n"}).shared_secret == ""


@pytest.mark.parametrize(
    ("environ", "fleet"),
    [
        ({"CACHE_FLEET": "all", "GITHUB_REPOSITORY": "octo-org/repo"}, "all"),
        ({"GITHUB_REPOSITORY": "octo-org/repo"}, "octo-org/repo"),
        ({"GITHUB_REPOSITORY": ""}, "default"),
    ],
)
def test_the_fleet_is_the_repository_unless_told_otherwise(environ: dict[str, str], fleet: str) -> None:
    assert Settings.from_env(environ).fleet == fleet


@pytest.mark.parametrize(
    ("environ", "registry"),
    [
        ({"CACHE_PEER_REGISTRY": "/r", "RUNNER_TEMP": "/t", "CACHE_DIR": "/d"}, "/r"),
        ({"RUNNER_TEMP": "/t", "CACHE_DIR": "/d"}, "/t/p2p_peers"),
        ({"CACHE_DIR": "/d"}, "/d/peers"),
    ],
)
def test_the_registry_lies_where_the_runner_keeps_what_is_temporary(environ: dict[str, str], registry: str) -> None:
    assert Settings.from_env(environ).peer_registry == Path(registry)


def test_an_override_wins_and_what_it_hides_is_not_even_read() -> None:
    assert Settings.from_env({"CACHE_LISTEN_PORT": "abc"}, listen_port=1).listen_port == 1


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Settings().listen_port = 1  # type: ignore[misc] # the point


def test_equal_environments_give_one_key_of_a_mapping() -> None:
    environ = {"CACHE_SHARED_SECRET": "s", "CACHE_DIR": "/d", "CACHE_GITHUB_HOSTS": "a,b"}
    assert len({Settings.from_env(environ), Settings.from_env(dict(environ))}) == 1


@given(
    st.text(string.ascii_letters + string.digits, min_size=12, max_size=40),
    st.sampled_from([bad for bad in BAD_TEXTS if bad[1] != "null"]),
)
@few
def test_a_secret_is_never_shown(secret: str, bad: tuple[str, str]) -> None:
    held = Settings(shared_secret=secret, previous_secret=secret[::-1] + "x")
    assume(secret not in bad[1])
    assert "shared_secret='…', previous_secret='…'" in repr(held)
    for shown in (repr(held), str(held), f"{held}", repr(held.__rich_repr__())):
        assert secret not in shown
        assert held.previous_secret not in shown
    environ = {"CACHE_SHARED_SECRET": secret, "CACHE_SHARED_SECRE": secret, "GITHUB_TOKEN": secret}
    with said() as lines, pytest.raises(SettingsError) as caught:
        Settings.from_env({**environ, variable(bad[0]): bad[1]})
    with said() as more:
        Settings.from_env(environ)
    assert secret not in str(caught.value)
    assert secret not in "\n".join(lines + more)
    for name in SECRETS:
        with pytest.raises(SettingsError) as refused:
            Settings(**{name: secret.encode()})  # type: ignore[arg-type] # wrong on purpose
        assert secret not in str(refused.value)


def edits(a: str, b: str) -> int:
    """The optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and (x, y) == (b[j - 2], a[i - 2]):
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


KNOWN = [variable(name) for name in Settings.__struct_fields__]
LETTERS = st.sampled_from("ABDEIP_2")


@st.composite
def misspelt(draw: st.DrawFn) -> str:
    name = draw(st.sampled_from(KNOWN)).removeprefix("CACHE_")
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, max(0, len(name) - 1)))
        how = draw(st.sampled_from(["insert", "delete", "substitute", "swap"]))
        if how == "insert":
            name = name[:at] + draw(LETTERS) + name[at:]
        elif how == "delete":
            name = name[:at] + name[at + 1 :]
        elif how == "substitute":
            name = name[:at] + draw(LETTERS) + name[at + 1 :]
        else:
            name = name[:at] + name[at : at + 2][::-1] + name[at + 2 :]
    return f"CACHE_{name}"


@given(misspelt())
@many
def test_a_name_is_warned_about_exactly_when_it_is_one_edit_from_a_setting(name: str) -> None:
    meant = [known for known in KNOWN if edits(name, known) == 1] if name not in KNOWN else []
    with said() as lines:
        Settings.from_env({name: ""})
    assert len(lines) == min(len(meant), 1)
    for line in lines:
        assert any(line == f"{name} is not a setting of httpx-p2pcache: did you mean {known}?" for known in meant)


@pytest.mark.parametrize("name", ["CACHE_CONTROL", "CACHE_", "CACHE_VERSION", "MY_CACHE_DIR", "cache_dir"])
def test_other_peoples_variables_are_left_alone(name: str) -> None:
    with said() as lines:
        Settings.from_env({name: "x"})
    assert lines == []


def test_every_setting_is_described_once_with_its_default() -> None:
    rows = describe()
    assert [row[0] for row in rows] == KNOWN
    assert all(title for _, _, title in rows)
    assert Settings.from_env({name: default for name, default, _ in rows}) == Settings()


def test_an_empty_text_in_code_is_what_was_meant() -> None:
    """Whoever says that there is no secret does not share under the token of the environment."""
    environment = {"GITHUB_TOKEN": "ghp_0123456789abcdef", "CACHE_SHARED_SECRET": "0123456789abcdef0123"}
    assert Settings.from_env(environment, shared_secret="").shared_secret == ""
    with pytest.raises(SettingsError):
        Settings.from_env(environment, fleet="")


def test_a_relative_directory_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_env({"CACHE_DIR": "cache", "CACHE_PEER_REGISTRY": "peers"})
    assert (settings.dir, settings.peer_registry) == (tmp_path / "cache", tmp_path / "peers")
    assert Settings(dir=Path("cache")).dir == tmp_path / "cache"
