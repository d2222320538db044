"""The curves of a comparison as one picture."""

from pathlib import Path
from typing import Any

import numpy as np

from common.tools.compare.measure import Cell, Comparison, Task

# Paul Tol's bright colours, which the colour-blind tell apart; beyond seven groups, dashes.
COLOURS = ["#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee", "#888888"]
DASHES = ["solid", "dash", "dot", "dashdot"]
ACROSS = 3  # panels


def style(group: int) -> tuple[str, str]:
    """Colour and dash of the group of this number."""
    return COLOURS[group % len(COLOURS)], DASHES[group // len(COLOURS) % len(DASHES)]


def draw(comparison: Comparison, path: Path, metric: str, x: str) -> None:
    """A panel a task: IQM and its band for each group; of a group that is alone, every run and evaluation as well.

    On the time axis a curve is drawn over the median of its runs' clocks.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    tasks, labels = comparison.tasks, list(comparison.groups)
    across = min(len(tasks), ACROSS)
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(7 if across == 1 else 4.2 * across, 3.6 * down + 0.3), dpi=110, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).reshape(-1)
    for panel, task in zip(panels, tasks, strict=False):
        for label, cell in task.cells.items():
            _curve(panel, task, cell, label, style(labels.index(label)), x, alone=len(labels) == 1)
        if task.threshold is not None:
            panel.axhline(task.threshold, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
        panel.set_title(task.env_id, fontsize=11)
        panel.set_xlabel("environment steps" if x == "steps" else "seconds")
        if x == "steps":
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(tasks) :]:
        panel.remove()
    for panel in panels[::across]:
        panel.set_ylabel(metric.removeprefix("charts/").replace("_", " "))
    handles = {text: line for panel in panels for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(len(handles), 2 * across + 1)}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=9, **place)
    figure.savefig(path)


def _curve(panel: Any, task: Task, cell: Cell, label: str, look: tuple[str, str], x: str, alone: bool) -> None:
    colour, dash = look
    line = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}[dash]
    centre, low, high = cell.band
    at = task.steps if x == "steps" else cell.seconds
    if alone:
        for run in cell.runs:
            panel.plot(at if x == "steps" else run.seconds, run.curve, color=colour, alpha=0.25, linewidth=0.8)
        dots = np.concatenate([run.evaluations for run in cell.runs], axis=1)
        if dots.size:
            where = dots[0 if x == "steps" else 1]
            panel.scatter(where, dots[2], color="#cc3311", s=16, alpha=0.7, zorder=3, label="greedy evaluations")
    panel.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
    name = f"{label}, IQM of {len(cell.runs)} runs" if alone else label
    panel.plot(at, centre, color=colour, linestyle=line, linewidth=2, label=name)
