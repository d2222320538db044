"""Every script passes `python -m common check`."""

import contextlib
import importlib.util

import pytest
from conftest import ROOT

from common.tools.check.checks import CHECKS, examine
from common.tools.check.harness import Harness

pytestmark = pytest.mark.timeout(900)
SCRIPTS = {  # the checks that have nothing to see in a script
    "rainbow": {"advantages", "entropy", "units"},
    "sac": {"n_step", "advantages"},
    "crossq": {"n_step", "advantages"},
    "ppo": {"n_step", "entropy", "units"},
    "ppo_recurrent": {"n_step", "entropy", "units"},
    "dqn_lightning": {"n_step", "advantages", "entropy", "units"},
    "pqn": {"n_step", "advantages", "entropy", "units"},
    "dqn": {"n_step", "advantages", "entropy", "units"},
    "reinforce_rollout": {"n_step", "advantages", "entropy", "units"},
}
# A run of Lightning takes 1.6 s. That this script learns what dqn.py learns, with each of its flags, is another test's.
SLOW = {"dqn_lightning": {"flags", "values", "policy"}}
SLOW["rainbow"] = {"values"}  # 3 steps are its default, so n_step asks the same
SLOW["ppo_recurrent"] = {"flags", "values", "policy"}  # as ppo.py, and twice as long
SLOW["crossq"] = {"flags", "values", "policy"}  # as sac.py, and twice as long


def failures(script, names):
    if script == "dqn_lightning" and importlib.util.find_spec("lightning") is None:
        pytest.skip('needs pip install -e ".[lightning]"')
    with contextlib.closing(Harness(ROOT / "algos" / f"{script}.py")) as harness:
        verdicts = list(examine(harness, names))
    assert {verdict.name for verdict in verdicts if verdict.word == "SKIP"} == SCRIPTS[script] & {*names}
    return [str(verdict) for verdict in verdicts if verdict.word == "FAIL"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_passes_the_checks(script):
    assert failures(script, tuple(name for name in CHECKS if name not in SLOW.get(script, ()))) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", SLOW)
def test_a_script_passes_the_checks_that_take_long(script):
    assert failures(script, tuple(SLOW[script])) == []


def test_every_script_is_checked():
    assert {path.stem for path in (ROOT / "algos").glob("*.py")} == {*SCRIPTS}
