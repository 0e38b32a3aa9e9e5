"""Makes docs/cli from the command's help and from the JSON schemas in that folder.

    python -m tests.cli.docs_pages

The width of the text is fixed, so that the pages are the same on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from azure_torch_ckpt.cli.app import NAME, app
from azure_torch_ckpt.cli.errors import EXIT_CODES

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "cli"
_WIDTH = 100


def pages() -> dict[str, str]:
    """Return the text of every page, by the name of its file."""
    return {"README.md": _index()} | {f"{name}.md": _page(name, command) for name, command in app.commands.items()}


def _help(command: click.Command, name: str | None = None) -> str:
    top = click.Context(app, info_name=NAME, terminal_width=_WIDTH, **app.context_settings)
    context = top if name is None else click.Context(command, info_name=name, parent=top, **command.context_settings)
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def _index() -> str:
    commands = "\n".join(f"- [`{name}`]({name}.md): {command.short_help}" for name, command in app.commands.items())
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    return f"""# The command `{NAME}`

`pip install 'azure-torch-ckpt[cli]'`. `python -m tests.cli.docs_pages` makes these pages from the command's help.

{commands}

```text
{_help(app)}
```

## Exit codes

| | |
|--:|---|
{codes}
| 141, 143 | as in a shell: the reader of a pipe closed it, SIGTERM |

An error is one line on stderr that starts with `{NAME}: error: `. A second line that starts with `{NAME}: hint: ` may
follow with advice. Progress bars, notes and questions go to stderr as well, and bars only to a terminal.

## JSON

`--json` prints one document to stdout and nothing else. After an error it prints none, with these exceptions: `verify`
and `diff` print the problems and differences that they found, and `rm` prints what it had removed. Each page lists the
fields, and [schema](schema) has them as [JSON Schema](https://json-schema.org). Sizes are bytes, times are RFC 3339 in
UTC, checksums are hexadecimal text. While `version` is 1, fields keep their meaning; new ones may be added, also to the
schema.

## Secrets

No output contains a secret, not even an error: everything that looks like a signature or a key is replaced by `***`.
There is no option for an account key or a connection string, because any user of a machine can read the arguments of
its processes. The same is true of `--sas` and of a SAS in a URL; `--sas -` prompts for it on a terminal, and reads a
line of stdin elsewhere.
"""


def _page(name: str, command: click.Command) -> str:
    schema = json.loads((FOLDER / "schema" / f"{name}.json").read_text(encoding="utf-8"))
    rows = "\n".join(f"| `{path}` | {kind} | {meaning} |" for path, kind, meaning in _fields(schema, ""))
    return f"""# {NAME} {name}

{command.short_help}

```text
{_help(command, name)}
```

## `--json`

| field | | |
|---|---|---|
{rows}

As JSON Schema: [schema/{name}.json](schema/{name}.json).
"""


def _fields(schema: dict[str, Any], above: str) -> list[tuple[str, str, str]]:
    """Return path, type and meaning of each field of an object, and after each field those of the object in it."""
    rows = []
    for name, field in schema["properties"].items():
        path = f"{above}{name}"
        inner = field.get("items", field)
        many = "[]" if "items" in field else ""
        kind = inner.get("type", f"`{json.dumps(inner.get('const'))}`")
        named = " or ".join(kind) if isinstance(kind, list) else kind
        rows.append((path + many, named, field.get("description", "")))
        if "properties" in inner:
            rows += _fields(inner, f"{path}{many}.")
    return rows


def main() -> None:
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
