"""The names that a script uses, listed in __init__.pyi. Each is imported at its first use, so that the processes of the
tools start without importing torch."""

import ast
import importlib
from pathlib import Path
from typing import Any

_LISTED = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
_MODULES = {name.name: line.module for line in _LISTED if isinstance(line, ast.ImportFrom) for name in line.names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'common' has no attribute {name!r}; docs/changed-names.md lists the renamed ones")
    value = getattr(importlib.import_module(str(_MODULES[name])), name)
    globals()[name] = value
    return value
