"""Makes docs/cli of the command's own help and of the JSON schemas that lie there.

    python -m tests.cli.docs_pages

The width is fixed, so that the pages are the same on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from azure_torch_ckpt.cli.app import NAME, app
from azure_torch_ckpt.cli.exit_codes import EXIT_CODES

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "cli"
_WIDTH = 100


def pages() -> dict[str, str]:
    """The text of every page by its file's name."""
    made = {"README.md": _index()}
    for name, command in app.commands.items():
        made[f"{name}.md"] = _page(name, command)
    return made


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
| 141, 143 | as a shell has it: the reader of a pipe has gone, SIGTERM |

Errors are one line on stderr that starts with `{NAME}: error: `, with a second one that starts with `{NAME}: hint: `
where there is something to try. Progress bars, notes and questions go to stderr as well, and bars only to a terminal.

## JSON

`--json` prints one document to stdout and nothing else there. After an error there is none, but for `verify` and
`diff`, whose findings are their result, and for `rm`, which tells what it had removed. Each page has the fields, and
[schema](schema) has them as [JSON Schema](https://json-schema.org). Sizes are bytes, times are RFC 3339 in UTC,
checksums are hexadecimal text. Fields stay what they are as long as `version` is 1; new ones may come, and then the
schema has them.

## Secrets

No output has one in it, an error's neither: what looks like a signature or a key is `***`. There is no option for an
account key or a connection string, for any user of a machine can read the arguments of its processes. That goes for
`--sas` and for a SAS in a URL, too; `--sas -` asks for it on a terminal, and reads a line of stdin elsewhere.
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
    """Path, type and meaning of each field of an object, those of objects in it behind it."""
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
