"""From files and overrides to a checked model: YAML, one level of defaults, and every mistake in one report."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from r3.errors import ConfigError

Tree = dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)
# Each round takes the keys of the faults found so far out of the data, so that checks behind them are reached.
_ROUNDS = 8


def read_tree(path: Path, find: Callable[[str], Path], shorthands: Mapping[str, str]) -> Tree:
    """Return the sections of a YAML file, laid over the file that its `defaults` names (one level, no further).

    `find` looks a name up as `--config` does, after the folder of `path`; `shorthands` maps a section to the key that
    a bare text in its place stands for. A key replaces the key of `defaults`, whatever it holds. Raises `ConfigError`.
    """
    tree = _read_yaml(path)
    parent = tree.pop("defaults", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: defaults is {parent!r}; name one other config file")
    beside = path.parent / parent
    source = beside if beside.is_file() else find(parent)
    base = _read_yaml(source)
    if "defaults" in base:
        raise ConfigError(
            f"{path} takes its defaults from {source}, which has defaults of its own ({base['defaults']!r}); "
            "one level is allowed, copy the keys into one of the two files"
        )
    for section, content in tree.items():
        ours, theirs = (_section(value, shorthands.get(section)) for value in (content, base.get(section)))
        mergeable = isinstance(ours, dict) and isinstance(theirs, dict)
        base[section] = theirs | ours if mergeable else content
    return base


def apply_override(tree: Tree, override: str, shorthands: Mapping[str, str]) -> None:
    """Set the value of one `key.path=value` in `tree`; raise `ConfigError` unless it has that form."""
    key, separator, raw = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        child = _section(node.get(section), shorthands.get(section) if node is tree else None)
        child = {} if child is None else child
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section} is {child!r}, not a section")
        node[section] = child
        node = child
    try:
        node[last] = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def validate(model: type[Model], tree: Tree, source: str, known: Sequence[str]) -> Model:
    """Return the checked model, or raise `ConfigError` with every fault, checks across keys included.

    pydantic leaves out checks across keys as soon as one key is wrong; they are reached by checking again without the
    wrong keys. A fault that names a key taken out so is a consequence and is not reported. `known`: every dotted key.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        faults = list(_faults(error, known))
    removed = {key for fault in faults for key in fault[0]}
    rest = copy.deepcopy(tree)
    for _ in range(_ROUNDS):
        for key in removed:
            _remove(rest, key)
        try:
            model.model_validate(rest)
            break
        except ValidationError as error:
            new = [fault for fault in _faults(error, known) if not removed & {*fault[0], *_mentioned(fault[1], known)}]
        if not new:
            break
        faults += new
        removed |= {key for fault in new for key in fault[0]}
    lines = "\n".join(f"  {text}" for _, text in faults)
    raise ConfigError(f"{source} has {len(faults)} error{'s' if len(faults) > 1 else ''}:\n{lines}")


def _faults(error: ValidationError, known: Sequence[str]) -> Iterator[tuple[frozenset[str], str]]:
    """Yield the keys to blame and the text of every fault; a check across keys may report several, one a line."""
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            yield frozenset([key]), f"{key}: unknown key{_suggestion(key, known)}"
        elif isinstance(item["input"], Mapping | BaseModel) and item["type"] == "value_error":
            for text in message.splitlines():
                yield _mentioned(text, known) or frozenset([key]), text
        else:
            yield frozenset([key]), f"{key}: {message} (got {item['input']!r})"


def _mentioned(text: str, known: Sequence[str]) -> frozenset[str]:
    words = set(re.findall(r"[a-z_0-9]+\.[a-z_0-9]+", text))
    return frozenset(words & set(known))


def _suggestion(key: str, known: Sequence[str]) -> str:
    sections = {name.partition(".")[0] for name in known}
    close = difflib.get_close_matches(key, [*known, *sections], n=1)
    if not close:
        close = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    return f"; did you mean {close[0]}?" if close else ""


def _remove(tree: Tree, key: str) -> None:
    *sections, last = key.split(".")
    node: Any = tree
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(last, None)


def _section(value: Any, shorthand: str | None) -> Any:
    return {shorthand: value} if isinstance(value, str) and shorthand else value


def _read_yaml(path: Path) -> Tree:
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; a mapping of sections is required")
    return data
