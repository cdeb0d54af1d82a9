"""The report in headless Chromium: it loads without an error or a request, its plots have ink, a sequence opens."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3.report.page import render
from r3.report.read import read_groups
from tests.made_up_run import make_run

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not start for root, whom containers run as.
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "one")
    page = run.path / "report.html"
    page.write_text(render(read_groups([run.path])))
    return page


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, file: Path) -> Iterator[Any]:
    """The report as it is shown, `errors` and `requests` seen on the way."""
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1280, "height": 900}, offline=True)
    shown = context.new_page()
    shown.errors, shown.requests = [], []
    shown.on("console", lambda message: shown.errors.append(message.text))
    shown.on("pageerror", lambda error: shown.errors.append(str(error)))
    shown.on("request", lambda request: shown.requests.append(request.url))
    shown.goto(file.as_uri())
    yield shown
    context.close()


def pixels(element: Any) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB"), np.int64)


def test_it_loads_without_a_word_on_the_console_and_fetches_nothing(page: Any, file: Path) -> None:
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith("data:")] == [file.as_uri()]


def test_every_plot_has_ink_that_stands_out(page: Any) -> None:
    figures = page.locator("figure").all()
    assert len(figures) >= 15
    for figure in figures:
        drawn = pixels(figure.locator("svg"))
        paper = drawn[2, 2]
        differs = np.abs(drawn - paper).sum(2) > 150
        assert differs.mean() > 0.003, figure.get_attribute("id")


def test_text_stands_out_from_the_paper(page: Any) -> None:
    drawn = pixels(page.locator("h1"))
    assert np.ptp(drawn) > 150


def test_a_sequence_opens_and_shows_its_tokens(page: Any) -> None:
    sequence = page.locator("details.step[open] details.sequence").first
    table = sequence.locator("table")
    assert not table.is_visible()
    sequence.locator("summary").click()
    assert table.is_visible()
    assert table.locator("tr").count() == 13, "a head and twelve tokens"
    assert page.errors == []


def test_nothing_is_wider_than_a_telephone(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
