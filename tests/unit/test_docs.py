"""The documentation says what the code does: generated pages are current, quoted messages, keys and files exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from r3.config import Config, describe
from tests.command import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
HEADINGS = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
KEYS = {key for key, _, _ in describe()}


def source() -> str:
    """Return all code as one text in which literals that stand side by side are joined."""
    texts = [path.read_text() for folder in ("r3", "rollout", "trainer") for path in (ROOT / folder).rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts))


def test_the_configuration_page_is_what_the_schema_says() -> None:
    script = [sys.executable, ROOT / "scripts" / "docs" / "configuration.py", "--check"]
    result = subprocess.run(script, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_configuration_page_has_a_row_for_every_key() -> None:
    page = (DOCS / "configuration.md").read_text()
    assert re.findall(r"^\| `([a-z_0-9]+\.[a-z_0-9]+)` \|", page, re.MULTILINE) == [key for key, _, _ in describe()]


def test_troubleshooting_has_messages() -> None:
    assert len(HEADINGS) > 20


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_quoted_message_is_in_the_code(heading: str) -> None:
    code = source()
    pieces = [piece.strip(" ?;:") for piece in heading.split("...")]
    missing = [piece for piece in pieces if piece and piece not in code]
    assert not missing, f"docs/troubleshooting.md quotes {missing}, which no message says"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    sections = "|".join(Config.model_fields)
    named = set(re.findall(rf"(?<![\w/.-])((?:{sections})\.[a-z_0-9]+)\b(?!\.|\()", page.read_text()))
    known = KEYS | {"metrics.jsonl", "metrics.md", "model.safetensors"}
    assert named - known == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"\b((?:scripts|configs|docs|r3|rollout|trainer)/[\w/.-]+\.\w+)", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("module", ["r3.train", "r3.doctor"])
def test_commands_that_pages_show_exist(module: str) -> None:
    assert any(f"python -m {module}" in page.read_text() for page in PAGES)
    for page in PAGES:
        for named in re.findall(r"python -m (r3(?:\.\w+)+)", page.read_text()):
            path = ROOT / named.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{page.name} shows {named}"
