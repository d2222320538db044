"""python -m common TOOL ...: the tools, from any folder."""

import importlib
import sys

from common.args import fail, say

TOOLS = {  # name: (module in common.tools, description)
    "benchmark": ("launch.benchmark", "run scripts on environments with several seeds; repeat the command to continue"),
    "check": ("check.checks", "check how a script handles episodes, seeds, flags and logging"),
    "check-results": ("launch.check_results", "repeat a row of the reference results and test its scores"),
    "compare": ("compare.compare", "compare curves, scores and costs of runs"),
    "evaluate": ("evaluate", "play the policy of a run and print its returns"),
    "sweep": ("launch.sweep", "search hyperparameters of a script, and test the best on new seeds"),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        table = "\n".join(f"  {name:<14} {description}" for name, (_, description) in TOOLS.items())
        say(f"usage: python -m common TOOL [-h] ...\n\n{table}")
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    tool = sys.argv[1]
    if tool not in TOOLS:
        fail(f"there is no tool {tool!r}; there are: {', '.join(TOOLS)}")
    importlib.import_module(f"common.tools.{TOOLS[tool][0]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
