"""The W&B workspace: its panels without W&B, the same view at every call, metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from r3 import dashboard
from r3.charts import DIFFERENCE, LAYERS, NATIVE_DIFFERENCE, SUMMARIES, WORST
from r3.errors import ConfigError
from r3.panels import SECTIONS
from tests.command import ROOT

KEYS = [line.key for section in SECTIONS for panel in section.panels for line in panel.lines]


def test_dry_run_prints_the_panels_without_wandb() -> None:
    program = (
        "import sys; sys.modules.update({'wandb': None, 'wandb_workspaces': None})\n"
        "from r3.dashboard import main; sys.exit(main(['--dry-run']))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    names = ["Log-prob difference", "Router", "Reward", "Transport", "Time"]
    assert [section["name"] for section in found["sections"]] == names
    assert found["sections"][0]["panels"][0]["lines"][0]["key"] == "mismatch/k3"


def test_every_metric_of_a_panel_is_documented_and_summarised() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    for key in KEYS:
        group, name = key.split("/", 1)
        assert group in SUMMARIES
        part = name.split("_")[-1]
        assert re.search(rf"`({group}/)?(\*|{name}|_{part})`", page), f"{key} is not in docs/metrics.md"


def test_media_of_the_sections_are_what_a_run_logs() -> None:
    media = {key for section in SECTIONS for key in section.media}
    assert media == {WORST, DIFFERENCE, NATIVE_DIFFERENCE, *LAYERS}


def test_panels_have_names_units_and_hints() -> None:
    panels = [panel for section in SECTIONS for panel in section.panels]
    assert len({panel.name for panel in panels}) == len(panels)
    assert all(panel.unit and panel.hint and panel.title for panel in panels)


def test_without_wandb_workspaces_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert dashboard.main(["--entity", "team"]) == 2
    assert "rollout-router-replay[dashboard]" in capsys.readouterr().err


class Views:
    """W&B's table of views, as far as wandb-workspaces talks to it."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.project = "r3"

    def find(self, entity: str, project: str, name: str) -> dict[str, Any]:
        if project != self.project:
            raise ValueError(f"Project `{entity}/{project}` not found.  Do you have access to this project?")
        if name not in self.rows:
            raise ValueError(f"Workspace `{name}` not found in project `{project}`")
        return self.rows[name]

    def save(self, view: Any) -> dict[str, Any]:
        name = view.name.removeprefix("nw-").removesuffix("-v")
        if view.id:
            assert self.rows[name]["id"] == view.id
        elif name in self.rows:
            raise AssertionError("a second view of the same name")
        row_id = view.id or f"id-{len(self.rows)}"
        spec = view.spec.model_dump_json(by_alias=True, exclude_none=True)
        self.rows[name] = {"id": row_id, "displayName": view.display_name, "spec": spec}
        return {"upsertView": {"view": {"id": row_id, "name": view.name}}}


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> Views:
    internal = pytest.importorskip("wandb_workspaces.workspaces.internal", reason="needs wandb-workspaces")
    interface = pytest.importorskip("wandb_workspaces.workspaces.interface")
    found = Views()
    monkeypatch.setattr(internal, "get_view_dict", found.find)
    monkeypatch.setattr(internal, "upsert_view2", found.save)
    monkeypatch.setattr(interface.wandb, "Api", lambda: None)
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.ai")
    return found


def test_a_second_call_updates_the_same_view(views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dashboard.save("team", "r3", "R3")
    assert len(views.rows) == 1
    monkeypatch.setattr(dashboard, "SECTIONS", SECTIONS[:2])
    assert dashboard.save("team", "r3", "R3") == first
    (row,) = views.rows.values()
    sections = json.loads(row["spec"])["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Log-prob difference", "Router"]
    assert row["displayName"] == "R3"


def test_the_saved_panels_are_those_of_the_specification(views: Views) -> None:
    dashboard.save("team", "r3", "R3")
    (row,) = views.rows.values()
    for saved, section in zip(json.loads(row["spec"])["section"]["panelBankConfig"]["sections"], SECTIONS, strict=True):
        configs = [panel["config"] for panel in saved["panels"]]
        for config, panel in zip(configs, section.panels, strict=False):
            assert config["metrics"] == [line.key for line in panel.lines]
            assert (config["xAxis"], config["chartTitle"], config["yAxisTitle"]) == ("step", panel.title, panel.unit)
            assert config["yLogScale"] == (panel.scale == "log")
        assert [key for config in configs for key in config.get("mediaKeys", [])] == list(section.media)


def test_a_project_that_is_not_there_is_an_error_with_the_fix(views: Views) -> None:
    with pytest.raises(ConfigError, match=r"team/other.*log one run"):
        dashboard.save("team", "other", "R3")
    assert not views.rows
