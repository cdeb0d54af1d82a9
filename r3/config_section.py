"""What sections of the configuration are made of: their base, and texts of a fixed form."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

_ENTRY_POINT = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


def _entry_point(value: object) -> object:
    if isinstance(value, str) and not _ENTRY_POINT.match(value):
        raise ValueError(f"{value!r} is not of the form 'package.module:name'")
    return value


EntryPoint = Annotated[str, BeforeValidator(_entry_point)]


def _http_url(value: object) -> object:
    if isinstance(value, str) and not re.match(r"^https?://[^/\s]+(/\S*)?$", value):
        raise ValueError(f"{value!r} is not of the form 'http://host:port'")
    return value.rstrip("/") if isinstance(value, str) else value


HttpUrl = Annotated[str, BeforeValidator(_http_url)]


class Section(BaseModel):
    """Base of every section: immutable, unknown keys are errors, field docstrings are the help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
