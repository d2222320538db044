"""A comparison as one HTML page that opens from a file, without a network or an account."""

import base64
import contextlib
import difflib
import html
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from common.internals.resume.files import data_file, read_file
from common.tools.compare.figure import style
from common.tools.compare.measure import Comparison
from common.tools.compare.tables import Table, number
from common.tools.find_runs import Run

EMBEDDED = 20_000_000  # bytes of videos that the page holds
MOST_CODE = 1_000_000  # bytes of a script or diff that is shown


def write(comparison: Comparison, path: Path, metric: str, command: str) -> None:
    """Writes the page, with plotly's code (4.6 MB) and up to 20 MB of videos; other videos are linked."""
    from plotly.offline import get_plotlyjs

    tasks, count = comparison.tasks, len(comparison.groups)
    groups = " and ".join(comparison.groups) if count < 5 else f"{count} groups"
    runs = sum(len(cell.runs) for task in tasks for cell in task.cells.values())
    parts = {
        "title": html.escape(f"{groups} on {', '.join(task.env_id for task in tasks)}"),
        "summary": f"runs: {runs}, groups: {count}, tasks: {len(tasks)}",
        "metric": html.escape(metric),
        "tables": "".join(map(_table, comparison.tables)),
        "videos": _videos(comparison, path.parent),
        "diffs": _diffs(comparison.groups),
        "runs": _runs(comparison),
        "notes": "<br>".join(map(html.escape, comparison.notes)),
        "command": html.escape(command),
        # "<" would let a name end the script element
        "data": json.dumps(_data(comparison), separators=(",", ":")).replace("<", "\\u003c"),
        "plotly": get_plotlyjs(),
    }
    template = (files("common.tools.compare") / "page.html").read_text("utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], template)
    path.write_text(page, "utf-8")


def _data(comparison: Comparison) -> dict[str, Any]:
    labels = list(comparison.groups)
    looks = map(style, range(len(labels)))
    groups = [{"label": label, "colour": c, "dash": d} for label, (c, d) in zip(labels, looks, strict=True)]
    tasks = []
    for task in comparison.tasks:
        cells = []
        for label, cell in task.cells.items():
            runs = [{"name": r.run.name, "curve": _numbers(r.curve), "seconds": _numbers(r.seconds)} for r in cell.runs]
            lines = dict(zip(("centre", "low", "high"), map(_numbers, cell.band), strict=True))
            cells.append({"group": labels.index(label), **lines, "seconds": _numbers(cell.seconds), "runs": runs})
        about = {"env_id": task.env_id, "steps": _numbers(task.steps), "threshold": task.threshold}
        tasks.append({**about, "cells": cells})
    return {"groups": groups, "tasks": tasks}


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def _table(table: Table) -> str:
    """Of what differs, arguments that only some groups have are folded: those of another script are many."""
    title = f"<h2>{html.escape(table.title)}</h2>\n"
    if table.title != "what differs":
        return title + _rows(table.header, table.rows)
    shared, some = ([row for row in table.rows if ("-" in row) is folded] for folded in (False, True))
    parts = _rows(table.header, shared) if shared else ""
    if some:
        parts += _folded(f"arguments that only some groups have: {len(some)}", _rows(table.header, some))
    return f'{title}<div class="differs">{parts}</div>'


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>{row(header, "th")}{body}</table></div>\n'


def _runs(comparison: Comparison) -> str:
    header = ["run", "group", "task", "seed", "final", "best", "steps", "seconds"]
    rows = []
    for task in comparison.tasks:
        for label, cell in task.cells.items():
            for one in cell.runs:
                numbers = [number(one.final), number(one.best), f"{one.end[0]:,.0f}", number(one.end[1])]
                rows.append([one.run.name, label, task.env_id, one.run.seed(), *numbers])
    return _folded(f"all {len(rows)} runs", _rows(header, rows))


def _videos(comparison: Comparison, here: Path) -> str:
    """Of each group and task the last video of the run with the median final score, or of the nearest that has one."""
    left, parts = EMBEDDED, []
    for task in comparison.tasks:
        figures = []
        for label, cell in task.cells.items():
            middle = float(np.median(cell.final))
            runs = sorted(cell.runs, key=lambda run: abs(run.final - middle))
            run, path = next(((run, path) for run in runs if (path := _last_video(run.run))), (None, None))
            if run is None or path is None:
                continue
            caption = f"{label}: seed {run.run.seed()} at step {int(path.stem[5:]):,}, score {number(run.final)}"
            if (size := path.stat().st_size) <= left:
                left -= size
                source = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
            else:
                source = Path(os.path.relpath(path, here.resolve())).as_posix()
                caption += ", linked: it plays only beside the run directories"
            video = f'<video controls muted loop playsinline preload="metadata" src="{html.escape(source)}"></video>'
            figures.append(f"<figure>{video}<figcaption>{html.escape(caption)}</figcaption></figure>")
        if figures:
            start = f"<h3>{html.escape(task.env_id)}</h3><div><button data-videos>play all</button>"
            parts.append(f'{start}<div class="videos">{"".join(figures)}</div></div>')
    return "<h2>Videos</h2>" + "\n".join(parts) if parts else ""


def _last_video(run: Run) -> Path | None:
    for path in sorted(run.path.glob("videos/step-*.mp4"), reverse=True) if run.path else ():
        with contextlib.suppress(OSError):  # a link, which may lead to any file of this machine
            if re.fullmatch(r"step-\d{1,18}", path.stem, re.ASCII):
                return data_file(run.path, f"videos/{path.name}").resolve()  # type: ignore[arg-type]
    return None


def _read(run: Run, name: str) -> str | None:
    """The text of a file of a run; None if it has none that can be shown."""
    try:
        return read_file(run.path, name, MOST_CODE).decode("utf-8", "replace") if run.path else None
    except (OSError, ValueError):
        return None


def _diffs(groups: dict[str, list[Run]]) -> str:
    """Each group's script as a diff against the first group's, or else against the script that it was forked from."""
    sources = {label: _sources(runs) for label, runs in groups.items()}
    first, base = next(iter(sources.items()))
    parts = []
    for label, found in sources.items():
        if len(found) > 1:
            parts.append(f"<p>The runs of {html.escape(label)} ran {len(found)} versions of their script.</p>")
        if found and base and found[0] != base[0]:
            (old_name, old), (new_name, new) = base[0], found[0]
            lines = difflib.unified_diff(old.splitlines(), new.splitlines(), old_name, new_name, lineterm="")
            parts.append(_diff(f"{label} against {first}", list(lines)))
        elif label == first or not base:
            kept = next((text for run in groups[label] if (text := _read(run, "source/parent.diff"))), None)
            if kept is not None:
                parts.append(_diff(f"{label} against the script it was forked from", kept.splitlines()))
    if not parts and len(groups) > 1:
        parts = ["<p>All groups ran the same code.</p>" if all(sources.values()) else "<p>The code was not stored.</p>"]
    return "<h2>Code</h2>" + "\n".join(parts) if parts else ""


def _diff(title: str, lines: list[str]) -> str:
    added, removed = (sum(line.startswith(sign) for line in lines[2:]) for sign in "+-")
    kinds = {"+": "add", "-": "del", "@": "at"}
    shown = "".join(f'<span class="{kinds.get(line[:1], "")}">{html.escape(line) or " "}</span>' for line in lines)
    return _folded(f"{title}: +{added} -{removed} lines", f'<pre class="diff"><code>{shown}</code></pre>')


def _sources(runs: list[Run]) -> list[tuple[str, str]]:
    """Name and text of each version of the script that the runs ran, most frequent first."""
    versions = [(f"{run.script}.py", _read(run, f"source/{run.script}.py")) for run in runs]
    return [(name, code) for (name, code), _ in Counter(versions).most_common() if code is not None]
