"""Settings: ``CACHE_*`` variables as one frozen, validated value.

Each field of :class:`Settings` is the variable's name in lower case without ``CACHE_``. The annotations carry what
documentation and error messages need, so neither is written twice: ``title`` says what the setting does,
``description`` what a value has to look like.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from httpx_p2pcache.exceptions import SettingsError
from httpx_p2pcache.multiaddrs import is_tcp

logger = logging.getLogger("httpx_p2pcache")

GIB, MIB = 1024**3, 1024**2
_UNITS = {"": 1, "kib": 1024, "mib": MIB, "gib": GIB, "kb": 10**3, "mb": 10**6, "gb": 10**9}

Flag = Annotated[bool, Meta(description="true or false")]
Seconds = Annotated[float, Meta(ge=0, le=31_536_000, description="a number of seconds from 0 to 31536000")]
Bytes = Annotated[int, Meta(ge=0, le=2**50, description="a number of bytes, as 8388608 or 8MiB")]
Port = Annotated[int, Meta(ge=0, le=65535, description="a port number from 0 to 65535")]
Hosts = Annotated[
    tuple[str, ...],
    Meta(description="hosts, separated by commas, as api.github.com or https://ghe.example:8443"),
]
Multiaddrs = Annotated[tuple[str, ...], Meta(description="multiaddrs, separated by commas, as /ip4/192.0.2.1/tcp/9100")]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one cache behaves. ``Settings()`` holds the defaults; :meth:`from_env` reads the environment.

    Raises :class:`SettingsError` for a value that cannot be used. Secrets never appear in its ``repr``.
    """

    enable_p2p: Annotated[Flag, Meta(title="share with other runners; false: a local cache only")] = True
    shared_secret: Annotated[
        str, Meta(title="who holds it is a member of the fleet; default: GITHUB_TOKEN, else GH_TOKEN")
    ] = ""
    previous_secret: Annotated[str, Meta(title="also accepted while a secret is being rotated")] = ""
    fleet: Annotated[
        str,
        Meta(min_length=1, description="a name", title="keeps fleets apart; default: GITHUB_REPOSITORY"),
    ] = "default"
    listen_port: Annotated[Port, Meta(title="TCP port of the node; taken: the next free one; 0: any")] = 9100
    listen_host: Annotated[
        str, Meta(description="an IP address", title="address the node listens on, and announces")
    ] = "0.0.0.0"  # noqa: S104 - runners on other machines must reach it; admission needs the secret
    announce_addrs: Annotated[Multiaddrs, Meta(title="multiaddrs announced instead of the ones listened on")] = ()
    bootstrap_peers: Annotated[Multiaddrs, Meta(title="multiaddrs of nodes to begin with")] = ()
    public_bootstrap: Annotated[Flag, Meta(title="fall back to the public libp2p bootstrap nodes")] = True
    artifacts: Annotated[
        Literal["run", "repository", "none"],
        Meta(
            description="run, repository or none",
            title="whose artifacts name peers on GitHub Actions: those of the workflow run, or of all its repository's",
        ),
    ] = "run"
    peer_registry: Annotated[
        Path | None,
        Meta(
            description="a path",
            title="directory of addresses; default: $RUNNER_TEMP/p2p_peers, else CACHE_DIR/peers",
        ),
    ] = None
    peer_ttl: Annotated[Seconds, Meta(title="how long an address counts without a heartbeat")] = 1800.0
    join_timeout: Annotated[Seconds, Meta(title="how long the first request may wait for the node")] = 0.0
    lookup_timeout: Annotated[Seconds, Meta(title="the most that asking the peers may delay a request")] = 0.25
    claim_timeout: Annotated[Seconds, Meta(title="how long one runner may fetch while the others wait for it")] = 10.0
    default_ttl: Annotated[Seconds, Meta(title="lifetime of a response that names none itself")] = 300.0
    stale_if_error: Annotated[
        Seconds | None,
        Meta(title="how stale an entry may be when the origin fails; default: 86400 for GitHub"),
    ] = None
    dir: Annotated[Path, Meta(description="a path", title="where entries are stored")] = Path("~/.cache/github_cli")
    encrypt_at_rest: Annotated[Flag, Meta(title="seal the bodies that are stored, with a key made of the secret")] = (
        False
    )
    max_size: Annotated[Bytes, Meta(title="size of the store on disk; 0: no limit")] = GIB
    max_body_size: Annotated[Bytes, Meta(title="larger bodies stream through unstored")] = 8 * MIB
    github_hosts: Annotated[Hosts, Meta(title="hosts, with or without scheme and port, that follow GitHub's rules")] = (
        "api.github.com",
    )
    computed_validators: Annotated[Flag, Meta(title="share across tokens where GitHub's ETag can be computed")] = True
    shared_identity: Annotated[Flag, Meta(title="treat every member of the fleet as one user")] = False
    node: Annotated[
        Literal["auto", "embedded", "daemon", "none"],
        Meta(
            description="auto, embedded, daemon or none",
            title="where the node runs: auto (the daemon, else here), embedded, daemon, none (nowhere)",
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        for name, spec in _SPECS.items():
            value = getattr(self, name)
            try:
                checked = msgspec.convert(value, spec.hint, dec_hook=_as_path)
            except msgspec.ValidationError:
                raise SettingsError(_complaint(name, value)) from None
            texts = checked if isinstance(checked, tuple) else [checked]
            if not all(_is_text(text) for text in texts if isinstance(text, str)):
                raise SettingsError(_complaint(name, value))
            msgspec.structs.force_setattr(self, name, checked)
        for name, well_formed in (("github_hosts", _is_host), ("announce_addrs", is_tcp)):
            for text in getattr(self, name):
                if not well_formed(text):
                    raise SettingsError(_complaint(name, text))
        try:
            ipaddress.ip_address(self.listen_host)
        except ValueError:
            raise SettingsError(_complaint("listen_host", self.listen_host)) from None
        if self.encrypt_at_rest and not self.shared_secret:
            raise SettingsError("CACHE_ENCRYPT_AT_REST needs CACHE_SHARED_SECRET: the key is made of it")
        if self.peer_registry is None:
            msgspec.structs.force_setattr(self, "peer_registry", self.registry)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, /, **overrides: Any) -> Settings:
        """The settings that ``environ`` (default: ``os.environ``) names; ``overrides`` are fields that win over it.

        Raises :class:`SettingsError`; an unknown ``CACHE_*`` name one edit away from a known one is warned about.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for name, spec in _SPECS.items():
            raw = environ.get(variable(name), "").strip()
            if overrides.get(name) and isinstance(overrides[name], str):  # as one would write it there
                raw = overrides.pop(name)
            if raw and name not in overrides:
                try:
                    values[name] = msgspec.convert(spec.read(raw), spec.hint, strict=False, dec_hook=_as_path)
                    if values[name] is None:  # "null", to msgspec
                        raise ValueError(raw)
                except (ValueError, KeyError):
                    raise SettingsError(_complaint(name, raw)) from None
        _warn_about_misspellings(environ)
        tokens = (environ.get(name, "").strip() for name in ("GITHUB_TOKEN", "GH_TOKEN"))
        values.setdefault("shared_secret", next(filter(None, tokens), ""))
        values.setdefault("fleet", environ.get("GITHUB_REPOSITORY") or "default")
        if environ.get("RUNNER_TEMP"):
            values.setdefault("peer_registry", Path(environ["RUNNER_TEMP"]) / "p2p_peers")
        return cls(**(values | overrides))

    @property
    def registry(self) -> Path:
        """The directory in which runners leave their addresses for each other."""
        return self.peer_registry or self.dir / "peers"

    def origins(self) -> dict[str, str]:
        """The hosts of ``github_hosts``, and the scheme by which each is reached: https, unless it is this machine.

        A host may be written with its scheme, as ``http://ghe.test:8080``.
        """
        found = {}
        for text in self.github_hosts:
            scheme, _, netloc = text.lower().removesuffix("/").rpartition("://")
            scheme = scheme or ("http" if _is_this_machine(netloc) else "https")
            found[netloc.removesuffix(f":{DEFAULT_PORTS[scheme]}")] = scheme
        return found

    def __repr__(self) -> str:
        shown = (
            f"{name}={'…' if name in SECRETS and getattr(self, name) else getattr(self, name)!r}" for name in _SPECS
        )
        return f"Settings({', '.join(shown)})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:  # rich would otherwise walk the fields, secrets included
        return [(name, "…" if name in SECRETS else getattr(self, name)) for name in _SPECS]


SECRETS = ("shared_secret", "previous_secret")
DEFAULT_PORTS = {"http": 80, "https": 443}
ADVICE = "Take 32 random characters, as from `openssl rand -hex 16`."


def can_be_guessed(secret: str) -> bool:
    """Whether a secret is one that trying finds: who records how members prove to hold it can try at leisure."""
    return len(secret) < 16 or len(set(secret)) < 8


class _Spec(NamedTuple):
    hint: Any
    read: Callable[[str], Any]  # from the text of a variable to what msgspec converts
    default: Any
    expected: str
    title: str


def _read_list(raw: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in raw.split(",") if word.strip())


def _read_bytes(raw: str) -> int:
    match = re.fullmatch(r"(\d+) ?([A-Za-z]*)", raw)
    if match is None:
        raise ValueError(raw)
    return int(match[1]) * _UNITS[match[2].lower()]


def _as_path(_: type, value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError("not a path")
    try:
        return Path(value).expanduser().absolute()  # wherever the process goes
    except RuntimeError:  # nobody of that name
        raise ValueError("not a path") from None


def _is_text(value: str) -> bool:
    """Not so where a variable holds bytes that are no UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _metas(hint: Any) -> list[Meta]:
    """What is annotated, from the outermost layer inwards."""
    own = [layer for layer in get_args(hint) if isinstance(layer, Meta)]
    return own[::-1] + [meta for inner in get_args(hint) if not isinstance(inner, Meta) for meta in _metas(inner)]


def _spec(field: msgspec.structs.FieldInfo, hint: Any) -> _Spec:
    metas = _metas(hint)
    text = {key: next((getattr(m, key) for m in metas if getattr(m, key)), "") for key in ("title", "description")}
    read: Callable[[str], Any] = str
    if isinstance(field.default, tuple):
        read = _read_list
    elif text["description"].startswith("a number of bytes"):
        read = _read_bytes
    return _Spec(hint, read, field.default, text["description"] or "text", text["title"])


_HINTS = get_type_hints(Settings, include_extras=True)
_SPECS: dict[str, _Spec] = {field.name: _spec(field, _HINTS[field.name]) for field in msgspec.structs.fields(Settings)}


def variable(field: str) -> str:
    """The environment variable of a field: ``listen_port`` is ``CACHE_LISTEN_PORT``."""
    return f"CACHE_{field.upper()}"


def describe() -> list[tuple[str, str, str]]:
    """For each setting: its variable, its default as one would write it (empty: none), what it does."""
    return [(variable(name), _written(spec.default), spec.title) for name, spec in _SPECS.items()]


def _written(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_host(text: str) -> bool:
    """Whether ``text`` is a host, with or without scheme and port (RFC 3986 §3.2), and nothing beside."""
    scheme, _, netloc = text.lower().removesuffix("/").rpartition("://")
    try:
        parts = urlsplit(f"//{netloc}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    alone = parts.netloc == netloc and "@" not in netloc
    return alone and port != 0 and scheme in ("", "http", "https") and re.fullmatch(r"[\w.:-]+", host) is not None


def _is_this_machine(netloc: str) -> bool:
    host, _, port = netloc.rpartition(":")
    name = host if port.isdecimal() else netloc
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost"


def _complaint(name: str, value: object) -> str:
    shown = "the value it has" if name in SECRETS else repr(value)
    return f"{variable(name)} must be {_SPECS[name].expected}, not {shown}"


def _warn_about_misspellings(environ: Mapping[str, str]) -> None:
    known = {variable(name) for name in _SPECS}
    for name in sorted(environ):
        if name.startswith("CACHE_") and name not in known:
            meant = [candidate for candidate in sorted(known) if _one_edit_apart(name, candidate)]
            if meant:
                logger.warning("%s is not a setting of httpx-p2pcache: did you mean %s?", name, meant[0])


def _one_edit_apart(a: str, b: str) -> bool:
    """Whether one insertion, deletion, substitution or swap of neighbours turns ``a`` into ``b``."""
    if len(a) > len(b):
        a, b = b, a
    if len(b) - len(a) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    if len(a) < len(b):
        return a[start:] == b[start + 1 :]
    swapped = a[:start] + a[start : start + 2][::-1] + a[start + 2 :]
    return a[start + 1 :] == b[start + 1 :] or swapped == b
