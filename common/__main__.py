"""python -m common TOOL ...: what works on runs, from any folder."""

import importlib
import sys

from common.args import fail

TOOLS = {  # its module in common.tools, and what it does
    "benchmark": ("launch.benchmark", "run scripts on environments with several seeds, and go on where that stopped"),
    "check": ("check.checks", "does a script, a fork of yours, handle episodes, seeds, flags and logging rightly?"),
    "check-results": ("launch.check_results", "run a row of the reference results again: do the scores still stand?"),
    "compare": ("compare.compare", "curves, scores and costs of runs, side by side"),
    "evaluate": ("evaluate", "play a run's policy and print its returns"),
    "sweep": ("launch.sweep", "search a script's hyperparameters, and try the best on fresh seeds"),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m common TOOL [-h] ...\n")
        print("\n".join(f"  {name:<14} {what}" for name, (_, what) in TOOLS.items()))
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    tool = sys.argv[1]
    if tool not in TOOLS:
        fail(f"there is no tool {tool!r}; there are: {', '.join(TOOLS)}")
    importlib.import_module(f"common.tools.{TOOLS[tool][0]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
