"""Pages that are made of what they describe: the README, the settings, the command's own help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: Any) -> Files:
    for name, text in {"index.md": home(), "configuration.md": configuration(), "options.md": options()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:  # noqa: ARG001 - mkdocs' signature
    return markdown.replace("](../README.md", "](index.md")


def home() -> str:
    """The README, as a page among its own links."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    text = re.sub(r'src(set)?="docs/([^"]+)"', r'src\1="\2"', text)
    return re.sub(r"\[([^\]]+)\]\((?:LICENSE|action\.yml|tests/[^)]*|benchmarks/[^)]*)\)", r"`\1`", text)


def configuration() -> str:
    """Each setting: from the definitions in ``httpx_p2pcache.settings``."""
    from httpx_p2pcache.settings import _SPECS, SECRETS, _written, variable

    lines = [
        "# Configuration\n",
        "Environment variables, read when a transport is made; `Settings.from_env` takes the same names in lower case",
        "without `CACHE_`, which win. A value that cannot be used is an error that names the variable and what it",
        "expects. A variable that is empty counts as not set; a name one letter away from one of these is warned",
        "about.\n",
    ]
    for name, spec in _SPECS.items():
        default = _written(spec.default)
        shown = "none" if default == "" else f"`{default}`"
        lines += [f"## `{variable(name)}`\n", f"{spec.title[0].upper()}{spec.title[1:]}.\n"]
        lines += [f"- a value is {spec.expected}", f"- default: {shown}"]
        lines += ["- never shown, in no message and no `repr`"] if name in SECRETS else []
        lines.append("")
    return "\n".join(lines)


def options() -> str:
    """Each command with its help as it prints it."""
    import typer
    from typer.core import TyperGroup

    from httpx_p2pcache.cli.app import app

    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    lines = [
        "# Every option\n",
        "What `p2pcache COMMAND --help` says. [Command line](command-line.md) tells what each is for.\n",
    ]
    for name, command in group.commands.items():
        lines += [f"## `p2pcache {name}`\n", _dedented(command.help or ""), ""]
        rows = [parameter.get_help_record(_context(command, name)) for parameter in command.params]
        shown = [row for row in rows if row is not None]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        for argument in arguments:
            lines.append(f"- `{(argument.name or '').upper()}`")
        for option, text in shown:
            if not any(option.strip().startswith((a.name or "").upper()) for a in arguments):
                lines.append(f"- `{option}`: {text}")
        lines.append("")
    return "\n".join(lines)


def _context(command: Any, name: str) -> Any:
    return command.context_class(command, info_name=name)


def _dedented(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines()).replace("\b\n", "")
