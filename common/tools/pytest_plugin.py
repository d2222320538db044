"""The checks of `python -m common check` as tests of pytest.

    pytest -p common.tools.pytest_plugin --plainrl-check my_ppo.py

runs the checks alone; with folders or files named as well, those tests too. In a conftest.py,
`pytest_plugins = ["common.tools.pytest_plugin"]` replaces `-p`. There is no entry point for pytest to load: in a
project with a folder `common` of its own, it would break every pytest.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.tools.check.checks import CHECKS, examine
from common.tools.check.harness import Harness


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "make the checks of `python -m common check SCRIPT`; may be given more than once"
    parser.addoption("--plainrl-check", action="append", default=[], metavar="SCRIPT", help=text)


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    scripts = config.getoption("--plainrl-check")
    if not scripts:
        return
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        items.clear()
    for script in scripts:
        harness = functools.cache(functools.partial(Harness, Path(script)))  # made by the first test, and shared
        items += [CheckItem.from_parent(session, name=name, script=script, harness=harness) for name in CHECKS]


class CheckItem(pytest.Item):
    def __init__(self, *, script: str, harness: Callable[[], Harness], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.script, self.harness = script, harness

    def runtest(self) -> None:
        (result,) = examine(self.harness(), (self.name,))
        if result.word == "SKIP":
            pytest.skip(result.text)
        assert result.word == "PASS", result.text

    def repr_failure(self, excinfo: Any, style: Any = None) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[str, None, str]:
        return self.script, None, f"{self.script}: {self.name}"
