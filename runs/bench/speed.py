"""What our scripts cost, beside Stable-Baselines3, SBX and CleanRL where they are given, in turn on the same core.

    PEERS="--sb3-python VENV1/bin/python --sbx-python VENV1/bin/python"
    PEERS="$PEERS --cleanrl CHECKOUT --cleanrl-python VENV2/bin/python"
    python runs/bench/speed.py steps dqn ppo ppo-64 ppo-mujoco sac $PEERS --core 1 --rounds 3
    python runs/bench/speed.py solved $PEERS --core 1 --rounds 5
    python runs/bench/speed.py cost dqn ppo reinforce_rollout sac --core 1
    python runs/bench/speed.py table runs/bench/results/speed/*.json

steps: environment steps a second in the steady state, CleanRL's hyperparameters for everybody (WORKS in
speed_parts.py), everybody with the logging that is its default: ours W&B, TensorBoard and metrics.jsonl, CleanRL
TensorBoard, the others what they keep in memory. Each round runs ours eager, ours with --compile and the peers, each
round beginning with another one. Ratios are between runs of the same round, in wall-clock time and in processor time:
the second tells less of what else the machine does. Then one more run of ours each says where the time goes.

solved: from the start of the process to a greedy evaluation of PPO on CartPole-v1 that reaches 475 over 20 episodes,
one every 5,000 steps; each library with its own hyperparameters, ours `algos/ppo.py --env-id CartPole-v1
--no-capture-video`. A round is a seed.

cost: steps a second and peak memory of ours against --num-envs, the width of the hidden layers and --buffer-size (a
full one), tracking off, as one figure a script (pip install -e ".[plot]").

Results with machine, versions and commit go to runs/bench/results/speed/. A peer's interpreter needs stable-baselines3,
sbx-rl (it may be one for both), or what CleanRL's checkout needs, and gymnasium[mujoco] for HalfCheetah.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from speed_parts import OURS, PEERS, ROOT, SOLVED, SOLVED_INTERVAL, WARM_UP, WORKS

from common.args import fail, warn

PARTS = (*OURS, *PEERS)
NAMES = {"eager": "ours", "compiled": "ours, --compile", "bf16": "ours, --compile --bf16"}
NAMES |= {"sb3": "Stable-Baselines3", "sbx": "SBX", "cleanrl": "CleanRL"}
CLOCKS = ("wall", "processor")
SWEEPS = {
    "num-envs": (1, 4, 16, 64, 256),
    "hidden-sizes": (64, 128, 256, 512, 1024),
    "buffer-size": (10_000, 100_000, 1_000_000),
}
COSTS = {
    "all": "--total-timesteps 1000000000 --no-track --save-interval 0",
    # What lets a point begin at once and give a row often enough:
    "dqn": "--learning-starts 300 --exploration-fraction 0 --log-interval 500",
    "ppo": "--log-interval 1000",
    "reinforce_rollout": "--log-interval 2000",
    "sac": "--learning-starts 300 --log-interval 100",
}
FILLED = {"buffer-size": ["--fill"]}
ENV_IDS = {"sac": "Pendulum-v1"}


def read(stdout: str) -> dict[str, Any]:
    """What a process of speed_parts.py said: its rows by their first word, those of CLOCK and EVAL as numbers."""
    said: dict[str, Any] = {"CLOCK": [], "EVAL": []}
    for line in stdout.splitlines():
        word, _, rest = line.partition(" ")
        if word in ("CLOCK", "EVAL"):
            said[word].append(tuple(map(float, rest.split())))
        elif word in ("VERSIONS", "PHASES", "MEMORY"):
            said[word] = json.loads(rest)
    return said


def rates(rows: list[tuple[float, ...]], window: tuple[float, float]) -> dict[str, float]:
    """Steps a second of each clock, from the first to the last row (step, seconds, processor seconds) in the window.

    Raises:
        ValueError: there are not two rows in it.
    """
    inside = [row for row in rows if window[0] <= row[0] <= window[1]]
    if len(inside) < 2:
        raise ValueError(f"{len(inside)} rows between steps {window[0]:,} and {window[1]:,}: two are needed")
    first, last = inside[0], inside[-1]
    return {name: (last[0] - first[0]) / (last[i] - first[i]) for i, name in enumerate(CLOCKS, start=1)}


def warm(rows: list[tuple[float, ...]], seconds: float) -> list[tuple[float, ...]]:
    """The rows from `seconds` of processor time after the first on."""
    return [row for row in rows if row[2] >= rows[0][2] + seconds]


def best_peer(speeds: dict[str, list[float]]) -> str | None:
    """The peer with the largest median, of those that ran."""
    ran = [part for part in PEERS if speeds.get(part)]
    return max(ran, key=lambda part: statistics.median(speeds[part])) if ran else None


def ratios(mine: list[float | None], other: list[float | None]) -> list[float]:
    """Round by round, where both ran."""
    return [a / b for a, b in zip(mine, other, strict=True) if a is not None and b is not None]


def spread(values: list[float], form: str = ",.0f") -> str:
    """Median and range."""
    middle = f"{statistics.median(values):{form}}" if values else "-"
    return f"{middle} ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else middle


def present(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def steps_table(result: dict[str, Any]) -> list[str]:
    """Markdown of what `steps` found: speeds, then ratios of ours to the best peer, for each clock."""
    lines = []
    for name in CLOCKS:
        lines += [f"Environment steps a second of {'wall-clock' if name == 'wall' else 'processor'} time:", ""]
        lines += ["| work | " + " | ".join(NAMES.values()) + " | best peer | ratio | compiled | bf16 |"]
        lines += ["|---" * (len(NAMES) + 5) + "|"]
        for work, found in result["works"].items():
            rounds = {part: [row and row[name] for row in rows] for part, rows in found["rounds"].items()}
            best = best_peer({part: present(values) for part, values in rounds.items()})
            cells = [spread(present(rounds.get(part, []))) for part in PARTS] + [NAMES[best] if best else "-"]
            for part in OURS:
                pairs = ratios(rounds[part], rounds[best]) if best and part in rounds else []
                cells.append(spread(pairs, ".2f"))
            lines.append(f"| {work} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines + phases_table(result)


def phases_table(result: dict[str, Any]) -> list[str]:
    """Markdown of the microseconds of processor time that a step of each phase takes."""
    found = {
        (work, part): phases for work in result["works"] for part, phases in result["works"][work]["phases"].items()
    }
    names = sorted({name for phases in found.values() for name in phases["seconds"]})
    lines = ["Microseconds of processor time an environment step, by phase:", ""]
    lines += ["| work | " + " | ".join(names) + " | all |", "|---" * (len(names) + 2) + "|"]
    for (work, part), phases in found.items():
        per_step = {name: 1e6 * seconds / phases["steps"] for name, seconds in phases["seconds"].items()}
        cells = [f"{per_step.get(name, 0.0):.1f}" for name in names] + [f"{sum(per_step.values()):.1f}"]
        lines.append(f"| {work}, {part} | " + " | ".join(cells) + " |")
    return [*lines, ""] if found else []


def solved_table(result: dict[str, Any]) -> list[str]:
    """Markdown of what `solved` found; in the shares a run that did not get there counts as infinitely long."""
    lines = ["| | solved | steps | seconds | of the best peer's | processor seconds | of the best peer's |"]
    lines.append("|---" * 7 + "|")
    rounds = result["rounds"]

    def median(part: str, name: str) -> float:
        return statistics.median([row[name] if row["solved"] else float("inf") for row in rounds[part]])

    for part, rows in rounds.items():
        got = [row for row in rows if row["solved"]]
        cells = [f"{len(got)} of {len(rows)}", spread([row["steps"] for row in got])]
        for name in CLOCKS:
            best = min((median(peer, name) for peer in PEERS if peer in rounds), default=float("inf"))
            share = f"{median(part, name) / best:.2f}" if best < float("inf") else "-"
            cells += [spread([row[name] for row in got], ".1f"), share]
        lines.append(f"| {NAMES[part]} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def cost_table(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['script']} on {result['env_id']}:", "", "| flag | steps a second | peak MB |", "|---|---|---|"]
    for point in result["points"]:
        rate, memory = (f"{point[key]:,.0f}" if point[key] else "-" for key in ("processor", "memory"))
        lines.append(f"| `--{point['flag']} {point['value']}` | {rate} | {memory} |")
    return [*lines, ""]


TABLES = {"steps": steps_table, "solved": solved_table, "cost": cost_table}


def machine(core: int) -> dict[str, Any]:
    """What the figures depend on, and on what commit they are; `changed` says that files differ from it."""
    cpu = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(
            git("status", "--porcelain", "--", "algos", "common", "runs/bench/speed.py", "runs/bench/speed_parts.py")
        ),
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "core": core,
        "system": platform.platform(),
        "load_at_start": os.getloadavg(),
    }


class Bench:
    """Starts the parts, and keeps the result file up to date, so that what ends in the middle loses nothing."""

    def __init__(self, args: argparse.Namespace, out: Path, **result: Any) -> None:
        self.args, self.out = args, out
        self.pythons = dict.fromkeys(OURS, sys.executable)
        for part in PEERS:
            if python := getattr(args, f"{part}_python", None):
                self.pythons[part] = python
        self.result = {"job": args.job, **machine(args.core), "versions": {}, **result}
        self.save()  # a file that cannot be written is known before minutes are spent

    def parts(self, number: int, bf16: bool = False) -> list[str]:
        """All parts, each round beginning with another one."""
        parts = [part for part in PARTS if part in self.pythons and (bf16 or part != "bf16")]
        return parts[number % len(parts) :] + parts[: number % len(parts)]

    def run(self, job: str, part: str, work: str, *words: str, limit: float = 1200) -> dict[str, Any]:
        """One process; what it said. One that fails is one warning, and says what it said until then."""
        command = [self.pythons[part], str(ROOT / "runs" / "bench" / "speed_parts.py"), job, part, work, *words]
        if part == "cleanrl":
            command += ["--cleanrl", str(Path(self.args.cleanrl).resolve())]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": os.environ.get("WANDB_MODE", "offline")}
        env.pop("PYTHONPATH", None)
        if part in OURS:
            env["PYTHONPATH"] = str(ROOT)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
        )
        late = False
        try:
            stdout, stderr = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
        except BaseException:  # Ctrl-C does not reach a session of its own
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if late and job != "solved":
            warn(f"{job} {part} {work}: killed after {limit:,.0f} seconds")
        elif process.returncode != 0 and not late:
            warn(f"{job} {part} {work}: exit code {process.returncode}: {(stderr.strip().splitlines() or ['?'])[-1]}")
        said = read(stdout)
        self.result["versions"].setdefault(part, said.get("VERSIONS"))
        return said

    def save(self) -> None:
        self.result["load_at_end"] = os.getloadavg()
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.result, indent=1) + "\n")
        except OSError as error:
            fail(f"cannot write {self.out}: {error.strerror}; name another file with --out", code=6)

    def show(self) -> None:
        self.save()
        print("\n" + "\n".join(TABLES[self.args.job](self.result)) + str(self.out))


def steps(args: argparse.Namespace) -> None:
    bench = Bench(args, Path(args.out or ROOT / "runs/bench/results/speed/steps.json"), works={})
    for work in args.works:
        parts = sorted(bench.parts(0, WORKS[work].bf16), key=PARTS.index)
        rounds: dict[str, list[dict[str, float] | None]] = {part: [] for part in parts}
        found: dict[str, Any] = {"window": WORKS[work].window, "rounds": rounds, "phases": {}}
        bench.result["works"][work] = found
        for number in range(args.rounds):
            for part in bench.parts(number, WORKS[work].bf16):
                try:
                    rounds[part].append(rates(bench.run("steps", part, work)["CLOCK"], WORKS[work].window))
                except ValueError as error:
                    warn(f"{work}, {part}: {error}")
                    rounds[part].append(None)
                shown = {name: round(rate) for name, rate in (rounds[part][-1] or {}).items()}
                print(f"{work}, round {number + 1}, {part}: {shown}", flush=True)
            bench.save()
        for part in [part for part in parts if part in OURS]:
            if phases := bench.run("phases", part, work).get("PHASES"):
                found["phases"][part] = phases
        bench.save()
    bench.show()


def solved(args: argparse.Namespace) -> None:
    out = Path(args.out or ROOT / "runs/bench/results/speed/solved.json")
    bench = Bench(args, out, interval=SOLVED_INTERVAL, limit=args.limit, rounds={})
    for number in range(args.rounds):
        for part in bench.parts(number):
            began = time.monotonic()
            rows = bench.run("solved", part, str(number + 1), limit=args.limit)["EVAL"]
            step, at, processor, mean = rows[-1] if rows else (0, began, 0.0, 0.0)
            row = {"solved": mean >= SOLVED, "steps": step, "wall": at - began, "processor": processor, "return": mean}
            bench.result["rounds"].setdefault(part, []).append(row)
            print(f"seed {number + 1}, {part}: {row}", flush=True)
        bench.save()
    bench.show()


def cost(args: argparse.Namespace) -> None:
    for script in args.scripts:
        out = Path(args.out or ROOT / f"runs/bench/results/speed/cost_{script}.json")
        env_id = ENV_IDS.get(script, "CartPole-v1")
        bench = Bench(args, out, script=script, env_id=env_id, compiled=args.compile, points=[])
        for flag, values in SWEEPS.items():
            if flag == "buffer-size" and script not in ("dqn", "sac"):
                continue
            if flag == "hidden-sizes" and script == "reinforce_rollout":
                continue  # its width is no flag
            for value in values:
                words = ["--env-id", env_id, "--seconds", str(args.seconds), *FILLED.get(flag, [])]
                words += [*COSTS["all"].split(), *COSTS[script].split()]
                words += [f"--{flag}", str(value), *([str(value)] if flag == "hidden-sizes" else [])]
                said = bench.run("cost", "compiled" if args.compile else "eager", script, *words, limit=300)
                point: dict[str, Any] = {"flag": flag, "value": value, "wall": None, "processor": None, "memory": None}
                try:
                    point |= rates(warm(said["CLOCK"], WARM_UP), (0, float("inf")))
                    point["memory"] = said["MEMORY"] / 1024  # Linux counts in kB
                except (ValueError, IndexError, KeyError) as error:
                    warn(f"{script} --{flag} {value}: {error}")
                bench.result["points"].append(point)
                print(script, point, flush=True)
                bench.save()
        bench.show()
        draw(bench.result, out.with_suffix(".png"))


def draw(result: dict[str, Any], path: Path) -> None:
    """One figure a script: speed above, memory below, a column a flag."""
    from matplotlib import pyplot as plt

    flags = [flag for flag in SWEEPS if any(point["flag"] == flag for point in result["points"])]
    figure, axes = plt.subplots(
        2, len(flags), figsize=(max(3.2 * len(flags), 4.4), 4.6), sharex="col", sharey="row", squeeze=False
    )
    for column, flag in enumerate(flags):
        points = [point for point in result["points"] if point["flag"] == flag and point["memory"]]
        for row, (key, label) in enumerate((("processor", "steps a processor second"), ("memory", "peak memory, MB"))):
            ax = axes[row][column]
            ax.plot([point["value"] for point in points], [point[key] for point in points], "o-")
            ax.set_xscale("log")
            ax.set_yscale("log" if row == 0 else "linear")
            ax.grid(alpha=0.3, which="both")
            if column == 0:
                ax.set_ylabel(label)
        axes[1][column].set_xlabel(f"--{flag}")
    axes[1][0].set_ylim(bottom=0)
    figure.suptitle(f"{result['script']} on {result['env_id']}, one core")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(path)


def table(args: argparse.Namespace) -> None:
    for name in args.files:
        try:
            result = json.loads(Path(name).read_text())
            lines = TABLES[result["job"]](result)
        except (OSError, ValueError, KeyError) as error:
            fail(f"{name} is no result of this command: {type(error).__name__}: {error}")
        print("\n".join(lines))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    for name, rounds in (("steps", 3), ("solved", 5)):
        job = jobs.add_parser(name)
        if name == "steps":
            job.add_argument("works", nargs="+", choices=sorted(WORKS), metavar="work", help=", ".join(WORKS))
        job.add_argument("--sb3-python", help="an interpreter with stable-baselines3")
        job.add_argument("--sbx-python", help="an interpreter with sbx-rl")
        job.add_argument("--cleanrl", help="a checkout of CleanRL")
        job.add_argument("--cleanrl-python", help="an interpreter with what CleanRL needs")
        job.add_argument("--rounds", type=int, default=rounds, help="runs of each part, in turn")
        if name == "solved":
            job.add_argument("--limit", type=float, default=300, help="seconds after which a run counts as not solved")
    job = jobs.add_parser("cost")
    job.add_argument("scripts", nargs="+", choices=list(COSTS)[1:], metavar="script", help=", ".join(list(COSTS)[1:]))
    job.add_argument("--seconds", type=float, default=3, help="processor time a point is measured for")
    job.add_argument("--compile", action="store_true", help="with --compile")
    job = jobs.add_parser("table", help="the tables of result files, as Markdown")
    job.add_argument("files", nargs="+")
    for name in ("steps", "solved", "cost"):
        jobs.choices[name].add_argument(
            "--core", type=int, default=0, help="the processor core everything is pinned to"
        )
        jobs.choices[name].add_argument("--out", help="the result file (default: in runs/bench/results/speed)")
    args = parser.parse_args(argv)
    if args.job == "table":
        return table(args)
    check(args)
    os.sched_setaffinity(0, {args.core})
    return {"steps": steps, "solved": solved, "cost": cost}[args.job](args)


def check(args: argparse.Namespace) -> None:
    """Ends the process with code 2 and one line where an argument cannot work, before minutes are spent."""
    if args.core not in os.sched_getaffinity(0):
        fail(f"--core {args.core} is none of this process's: {sorted(os.sched_getaffinity(0))}")
    if args.job == "cost":
        if args.out and len(args.scripts) > 1:
            fail("--out names one file: give one script")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            fail('the figures need matplotlib: pip install -e ".[plot]"')
        return
    if args.rounds < 1:
        fail(f"--rounds must be at least 1, not {args.rounds}")
    if bool(args.cleanrl) != bool(args.cleanrl_python):
        fail("CleanRL needs both --cleanrl, its checkout, and --cleanrl-python, an interpreter with what it needs")
    if args.cleanrl and not (Path(args.cleanrl) / "cleanrl" / "ppo.py").exists():
        fail(f"--cleanrl {args.cleanrl} is no checkout of CleanRL: it has no cleanrl/ppo.py")
    for part in PEERS:
        python = getattr(args, f"{part}_python")
        if python and not os.access(python, os.X_OK):
            fail(f"--{part}-python {python} is no interpreter that can be run")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; what was measured before is in the result file", code=130)
