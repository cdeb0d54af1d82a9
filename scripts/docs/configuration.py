#!/usr/bin/env python3
"""Write docs/configuration.md from the schema in r3/config*.py; `--check` only compares, and exits 1 when stale."""

from __future__ import annotations

import argparse
import sys
import types
import typing
from pathlib import Path

from pydantic.fields import FieldInfo

from r3.config import Config, HttpUrl, Section

TARGET = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
HEAD = """\
# Configuration

<!-- Written by scripts/docs/configuration.py from the schema in r3/config*.py: change that, then run the script. -->

    python -m r3.train --config FILE [key.path=value ...] [--dry-run]

`FILE` is a path, a name in `./configs`, or a name shipped in the package (`grpo_qwen3moe`). Values after it override
single keys and are read as YAML. `--dry-run` checks everything that can be checked without starting anything, prints
the resolved config and, as comments, a memory plan, and exits 0 or 2. Every wrong key is reported at once.

A file may begin with `defaults: OTHER.yaml`, a file beside it or any name that `--config` takes. Its keys lie over
those of `OTHER.yaml`, section by section; a key replaces the key of the other file, whatever it holds. One level: the
other file has no `defaults` of its own.

    defaults: grpo_qwen3moe.yaml
    model: /data/qwen3-moe
    trainer: {lr: 1e-6}

`model: NAME` is short for `model: {path: NAME}`. A run writes what it resolved to `RUN/config.resolved.yaml`, which
is a config file too.
"""


def page() -> str:
    """Return the page: one table per section, one row per key."""
    parts = [HEAD]
    for name, outer in Config.model_fields.items():
        section = outer.annotation
        assert isinstance(section, type)
        assert issubclass(section, Section)
        rows = [row(f"{name}.{key}", field) for key, field in section.model_fields.items()]
        head = "| key | type | default | meaning |\n|---|---|---|---|"
        parts.append(f"## {name}\n\n{section.__doc__}\n\n{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def row(key: str, field: FieldInfo) -> str:
    """Return the row of one key."""
    default = "null" if field.default is None else str(field.default).lower().replace("|", "\\|")
    default = str(field.default) if isinstance(field.default, str) else default
    default = str(list(field.default)) if isinstance(field.default, tuple) else default
    kind = " ".join(filter(None, (type_name(field.annotation), limits(field))))
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{key}` | {kind} | `{default}` | {meaning} |"


def type_name(annotation: object) -> str:
    """Return a type as a reader of YAML knows it."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(annotation))
    if origin is typing.Annotated:
        return "URL" if annotation == HttpUrl else "`module:name`"
    if origin is tuple:
        return f"list of {type_name(typing.get_args(annotation)[0])}"
    names = {str: "text", int: "integer", float: "number", bool: "true, false", Path: "path", type(None): "null"}
    return names.get(annotation, "mapping" if origin is dict else str(annotation))  # type: ignore[call-overload]


def limits(field: FieldInfo) -> str:
    """Return the bounds of a number."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [f"{sign} {getattr(part, name)}" for part in field.metadata for name, sign in signs.items()
             if getattr(part, name, None) is not None]  # fmt: skip
    return ", ".join(found).replace("<", "\\<")


def main() -> int:
    """Write or compare the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    text = page()
    if not options.check:
        TARGET.write_text(text)
        return 0
    if TARGET.read_text() != text:
        print(f"{TARGET} is not what the schema says; run scripts/docs/configuration.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
