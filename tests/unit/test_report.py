"""The report: every plot has ink, nothing is fetched, nothing that a model said becomes markup, seeds become bands."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from r3.panels import SECTIONS, Section
from r3.report import figures as report_figures
from r3.report import page as report_page
from r3.report.__main__ import main
from r3.report.figures import pictures
from r3.report.page import chosen, findings, render
from r3.report.read import Run, read_groups
from tests.made_up_run import HOSTILE, make_run, make_tokens

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of one finished run."""
    run = make_run(tmp_path_factory.mktemp("runs") / "one")
    return render(read_groups([run.path]))


@pytest.fixture
def one_panel(monkeypatch: pytest.MonkeyPatch) -> Section:
    """Reports of one plot, which are drawn in a moment."""
    section = Section("Log-prob difference", SECTIONS[0].panels[:1])
    for module in (report_figures, report_page):
        monkeypatch.setattr(module, "SECTIONS", (section,))
    monkeypatch.setattr(report_figures, "OVERVIEW", ("k3",))
    return section


def figures(page: str) -> dict[str, ElementTree.Element]:
    """Return the SVG of every plot by name."""
    found = re.findall(r'<figure id="plot-(\w+)">.*?(<svg.*?</svg>)', page, re.DOTALL)
    return {name: ElementTree.fromstring(svg) for name, svg in found}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def tags(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page)
    return parser.seen


def test_every_section_is_there_with_plots_that_have_ink(page: str) -> None:
    assert [
        section.name for section in SECTIONS if f'<h2 id="{section.name.lower().replace(" ", "-")}"' not in page
    ] == []
    drawn = figures(page)
    assert {"k3", "tail", "histogram", "overlap", "shadow_layers_0", "reward", "bytes", "step_time"} <= drawn.keys()
    for name, svg in drawn.items():
        images = [e for e in svg.iter() if e.tag.endswith("image")]
        lines = [e for e in svg.iter() if e.tag.endswith("path") and e.get("clip-path")]
        assert images or lines, f"plot {name} is empty"


def test_axes_have_units(page: str) -> None:
    for name, svg in figures(page).items():
        texts = " ".join(filter(None, (e.text for e in svg.iter() if e.tag.endswith("text"))))
        if "layers" in name:
            assert "share of tokens" in texts
    for panel in (panel for section in SECTIONS for panel in section.panels):
        if panel.name in figures(page):
            assert panel.unit in page, panel.name


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    found = tags(page)
    assert not [tag for tag, _ in found if tag in ("script", "iframe", "object", "embed")]
    links = [
        value
        for tag, attributes in found
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href", "action") and value
    ]
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    assert "@import" not in page
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {u for u in re.findall(r"url\((#[^)]*)\)", page)}


def test_ids_are_unique(page: str) -> None:
    ids = [
        attributes["id"] for tag, attributes in tags(page) if "id" in attributes and tag in ("figure", "h2", "clippath")
    ]
    assert len(ids) == len(set(ids))


def test_what_a_model_said_is_text(page: str) -> None:
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)" in page


def test_colours_come_from_the_page_so_that_it_can_be_dark(page: str) -> None:
    k3 = re.search(r'<figure id="plot-k3">.*?</figure>', page, re.DOTALL)
    assert k3
    assert "var(--s0)" in k3[0]
    assert "currentColor" in k3[0]
    assert "#0072b2" not in k3[0]
    assert "prefers-color-scheme: dark" in page


def test_a_sequence_opens_with_every_token(page: str) -> None:
    report = make_tokens(11)
    opened = page[page.index("step 11 ") : page.index("step 6 ")]
    assert opened.count('<details class="sequence">') == len(report.sequences)
    one = report.sequences[0]
    table = opened[opened.index('<details class="sequence">') :]
    for value in one.tokens.train:
        assert f"{value:.4f}" in table


def test_seeds_of_one_configuration_are_one_group(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        make_run(tmp_path / f"r3-{seed}", overrides=[f"run.seed={seed}"])
    make_run(tmp_path / "none-0", steps=9, overrides=["replay.mode=none"])
    groups = read_groups(sorted(tmp_path.iterdir()))
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("replay.mode=none", 1),
        ("replay.mode=r3 (3 seeds)", 3),
    ]
    steps, values = groups[1].band("mismatch/k3")
    assert steps.tolist() == list(range(1, 13))
    rows = [{row["step"]: row["mismatch/k3"] for row in run.rows} for run in groups[1].runs]
    np.testing.assert_array_equal(values, [[row[step] for step in range(1, 13)] for row in rows])


def test_a_band_covers_the_steps_that_every_seed_has(tmp_path: Path) -> None:
    make_run(tmp_path / "a", steps=8)
    make_run(tmp_path / "b", steps=5, state="running", overrides=["run.seed=1"])
    (group,) = read_groups([tmp_path / "a", tmp_path / "b"])
    assert group.band("mismatch/k3")[0].tolist() == [1, 2, 3, 4, 5]
    assert group.band("nothing/here")[1].size == 0


def test_smoothing_is_the_mean_of_the_last_values(tmp_path: Path) -> None:
    make_run(tmp_path / "a", steps=30)
    (group,) = read_groups([tmp_path / "a"])
    steps, raw = group.band("rollout/reward_mean")
    smooth_steps, smooth = group.band("rollout/reward_mean", 10)
    assert (steps[0], smooth_steps[0], smooth_steps[-1]) == (1, 10, 30)
    assert smooth[0, 5] == pytest.approx(raw[0, 5:15].mean())


def test_findings_name_what_is_wrong(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good")
    assert [finding.level for finding in findings(Run.read(good.path))] == ["good"]
    bad = make_run(tmp_path / "bad", steps=3, overrides=["replay.mode=none"])
    bad.log_metrics({"step": 4, "mismatch/k3": 1.1, "router/coverage": 0.5, "router/mismatched_ids": 3.0})
    bad.log_event("routing_alarm", step=4, rule="lag", sentence="the record fits better shifted by one token")
    bad.write_status("failed", exit_code=3, error="AuditError: step 4")
    found = list(findings(Run.read(bad.path)))
    assert [finding.level for finding in found] == ["bad"] * 5 + ["note"]
    for part in ("AuditError: step 4", "step 4 (lag)", "1.1 nats in step 4", "coverage is 0.5", "3 recorded ids"):
        assert any(part in finding.text for finding in found), part


def test_it_opens_while_a_line_is_being_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4, state="running")
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "mismatch/k3": 1')
    with run.tokens.open("a") as file:
        file.write('{"step": 6, "tot')
    (group,) = read_groups([run.path])
    assert [row["step"] for row in group.runs[0].rows] == [1, 2, 3, 4]
    assert [report.step for report in group.runs[0].tokens] == [1]


def test_a_run_that_has_not_begun_gives_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=0, state="starting")
    page = render(read_groups([run.path]))
    assert "starting, step 0" in page
    assert figures(page) == {}


@pytest.mark.usefixtures("one_panel")
def test_watch_writes_until_the_run_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, pages = make_run(tmp_path / "run", steps=2, state="running"), []

    def sleep(seconds: float) -> None:
        pages.append((run.path / "report.html").read_text())
        run.log_metrics({"step": 2 + len(pages), "mismatch/k3": 1e-4})
        if len(pages) == 2:
            run.write_status("done", step=4)
        assert seconds == 7

    assert main([str(run.path), "--watch", "7"], sleep=sleep) == 0
    last = (run.path / "report.html").read_text()
    assert [('http-equiv="refresh" content="7"' in page) for page in (*pages, last)] == [True, True, False]
    assert "done, step 4" in last
    assert len(capsys.readouterr().out.splitlines()) > 3


@pytest.mark.usefixtures("one_panel")
def test_pngs_are_written_beside_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", steps=6)
    assert main([str(run.path), "--out", str(tmp_path / "out" / "r.html"), "--png", str(tmp_path / "png")]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert written[0] == tmp_path / "out" / "r.html"
    assert {path.name for path in written[1:]} == {"overview.png", "log-prob_difference.png"}
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err


def test_without_matplotlib_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", steps=1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(run.path)]) == 2
    assert "rollout-router-replay[plot]" in capsys.readouterr().err


def test_the_steps_that_open_are_the_newest_and_the_worst() -> None:
    reports = [make_tokens(step) for step in range(1, 40)]

    def largest(step: int) -> float:
        tokens = make_tokens(step).worst.tokens
        return max(abs(a - b) for a, b in zip(tokens.train, tokens.rollout, strict=True))

    worst = sorted(range(1, 38), key=largest)[-2:]
    assert [report.step for report in chosen(reports)] == sorted({38, 39, *worst}, reverse=True)


def test_alarms_shade_their_steps(tmp_path: Path, one_panel: Section) -> None:
    run = make_run(tmp_path / "run", steps=8)
    (before,) = pictures(one_panel, read_groups([run.path]))
    run.log_event("routing_alarm", step=5, rule="lag", sentence="shifted")
    (after,) = pictures(one_panel, read_groups([run.path]))
    assert "var(--alarm)" not in before.svg
    assert "var(--alarm)" in after.svg
