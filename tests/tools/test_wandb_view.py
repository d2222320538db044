"""docs/wandb_workspace.py: the view that it saves, on a stand-in for the W&B server."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from fake_wandb import FakeWandb

pytest.importorskip("wandb_workspaces")
RECIPE = ROOT / "docs" / "wandb_workspace.py"


class Server(FakeWandb):
    views: list = []  # noqa: RUF012

    def _graphql(self, operation, v):
        if "spec" in v:  # upsertView has no operation name
            self.views.append(v)
            return {"data": {"upsertView": {"view": {"id": "Vmlldzox", "name": "nw-0123456789a-v"}}}}
        return super()._graphql(operation, v)


def recipe(*words, env=None):
    command = [sys.executable, str(RECIPE), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})


def test_the_view_is_saved_with_steps_as_x_axis_and_runs_grouped():
    server = Server()
    try:
        done = recipe("me/plainrl", "--group", "baseline", "my_idea", env=server.env)
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("me/plainrl?nw=0123456789a")
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "plainrl", "PlainRL")
    section = json.loads(view["spec"])["section"]
    (runs,) = section["runSets"]
    (only,) = runs["filters"]["filters"]
    assert (only["key"]["name"], only["op"], only["value"]) == ("group", "IN", ["baseline", "my_idea"])
    assert [part["name"] for part in runs["grouping"]] == ["env_id.value", "script.value"]
    assert section["settings"]["xAxis"] == "global_step"
    panels = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    curves = [panel["config"] for panel in panels if "metrics" in panel["config"]]
    assert {key for curve in curves for key in curve["metrics"]} >= {"charts/episodic_return", "eval/episodic_return"}
    assert {curve["xAxis"] for curve in curves} == {"global_step"}
    assert [p["config"]["mediaKeys"] for p in panels if "mediaKeys" in p["config"]] == [["videos/eval"]]


def test_without_a_login_it_is_one_line_and_can_be_printed():
    done = recipe("me/plainrl")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert recipe("plainrl").stderr == "error: ENTITY/PROJECT, not plainrl\n"
    printed = json.loads(recipe("me/plainrl", "--print", "--by", "wandb_group").stdout)
    assert [part["name"] for part in printed["spec"]["section"]["runSets"][0]["grouping"]] == ["wandb_group.value"]
