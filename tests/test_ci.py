"""The audit of dependencies tells "nothing found" from "nobody asked"."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FOUND = "Found 1 known vulnerability in 1 package\nName Version ID\ntorch 2.0.0 PYSEC-1"


@pytest.mark.parametrize(
    ("answer", "code", "expected", "says"),
    [
        ("No known vulnerabilities found", 0, 0, "packages, no known vulnerabilities"),
        (FOUND, 1, 1, "PYSEC-1"),
        ("ERROR:pip_audit._cli:absl-py: Dependency not found on PyPI and could not be audited", 1, 0, "NOT DONE"),
        ("ConnectionError: Max retries exceeded", 1, 0, "NOT DONE"),
    ],
)
def test_an_audit_that_could_not_reach_its_database_does_not_count_as_passed(answer, code, expected, says, tmp_path):
    fake = tmp_path / "pip-audit"
    fake.write_text(f"#!/bin/sh\ncat >> {tmp_path}/asked <<'E'\n$@\nE\ncat <<'E'\n{answer}\nE\nexit {code}\n")
    fake.chmod(0o755)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / ".ci" / "audit"],
        env={**os.environ, "PIP_AUDIT": str(fake), "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == expected
    assert says in done.stdout + done.stderr
    assert (code == 0) == ("no known vulnerabilities" in done.stdout)
    assert (tmp_path / "asked").exists()
