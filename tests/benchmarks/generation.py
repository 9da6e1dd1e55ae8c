"""`generate` against a bare `aiohttp` loop and a plain `datasets.map`, on one loopback endpoint.

    python -m tests.benchmarks.generation [--only throughput --only limit] [--runs 3]

Every client runs as a process of its own; wall time, processor time and peak memory are of all of
it, start-up included. Rows a second are those of the work alone. Each scenario prints its bars.
"""

import argparse
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.clients import CLIENTS
from tests.benchmarks.endpoint import Faults, Served, serve


@dataclass(frozen=True)
class Options:
    """The size of the work, and how often the throughput is measured."""

    rows: int
    concurrency: int
    timeout: float
    runs: int


@dataclass(frozen=True)
class Run:
    """What became of one client's process; None where it broke off."""

    wall: float
    cpu: float
    peak: float
    seconds: float | None
    rows: int | None
    errors: str

    @property
    def a_second(self) -> float:
        """Rows."""
        return (self.rows or 0) / self.seconds if self.seconds else 0.0


def start(
    client: str, served: Served, folder: Path, options: Options, rows: int
) -> "subprocess.Popen[str]":
    """A client's process, in a group of its own."""
    folder.mkdir(exist_ok=True)
    sizes = {"rows": rows, "concurrency": options.concurrency, "timeout": options.timeout}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.benchmarks.clients", client),
            *("--url", served.url, "--folder", str(folder)),
            *(f"--{name}={value}" for name, value in sizes.items()),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    """Ours; modules are compiled once, as those of an installed package are."""
    kept = {name: value for name, value in os.environ.items() if "BYTECODE" not in name}
    compiled = str(Path(tempfile.gettempdir(), "distill-datasets-benchmark"))
    return {**kept, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONPYCACHEPREFIX": compiled}


def run(
    client: str, served: Served, folder: Path, options: Options, rows: int | None = None
) -> Run:
    """Let a client do its work, and measure its process."""
    began = time.perf_counter()
    process = start(client, served, folder, options, rows or options.rows)
    said, errors = process.communicate()
    return _measured(process, began, said, errors)


def _measured(process: "subprocess.Popen[str]", began: float, said: str, errors: str) -> Run:
    wall = time.perf_counter() - began
    found = json.loads(said.splitlines()[-1]) if process.returncode == 0 else {}
    usage = found.get("usage", {"cpu": 0.0, "peak": 0.0})
    return Run(wall, usage["cpu"], usage["peak"], found.get("seconds"), found.get("rows"), errors)


def bar(name: str, found: float, limit: float, unit: str = "", *, least: bool = False) -> bool:
    """Print one bar, and whether it is passed."""
    passed = found >= limit if least else found <= limit
    sign = ">=" if least else "<="
    verdict = "PASS" if passed else "FAIL"
    print(f"  {verdict}  {name}: {found:,.2f}{unit} (bar: {sign} {limit:,.2f}{unit})", flush=True)
    return passed


def throughput(options: Options) -> bool:
    """Rows a second, processor time and memory of all three, and a second run of each."""
    print("client         rows/s   wall s  start s  CPU ms/row  peak MB   again s  requests")
    found: dict[str, list[Run]] = {client: [] for client in CLIENTS}
    again: dict[str, list[tuple[float, int]]] = {client: [] for client in CLIENTS}
    for _ in range(options.runs):
        for client in CLIENTS:
            with serve() as served, tempfile.TemporaryDirectory() as scratch:
                one = run(client, served, Path(scratch), options)
                before = served.stats()["requests"]
                second = run(client, served, Path(scratch), options)
                found[client].append(one)
                again[client].append((second.wall, served.stats()["requests"] - before))
    for client, runs in found.items():
        one = sorted(runs, key=lambda run: run.a_second)[len(runs) // 2]
        wall, requests = sorted(again[client])[len(runs) // 2]
        start_up = one.wall - (one.seconds or 0.0)
        print(
            f"{client:<13}{one.a_second:>8,.0f}{one.wall:>9.2f}{start_up:>9.2f}"
            f"{one.cpu / options.rows * 1e3:>12.2f}{one.peak:>9.0f}{wall:>10.2f}{requests:>10}"
        )
    ratios = [
        ours.a_second / bare.a_second
        for ours, bare in zip(found["ours"], found["aiohttp"], strict=True)
    ]
    middle = statistics.median
    # A number of milliseconds would say how fast the machine is: start-up alone is most of it.
    times = {
        other: middle(
            one.cpu / beside.cpu for one, beside in zip(found["ours"], found[other], strict=True)
        )
        for other in ("aiohttp", "datasets.map")
    }
    print(f"  CPU a row against aiohttp: {times['aiohttp']:.2f}x")
    return all(
        [
            bar("rows/s against bare aiohttp", middle(ratios), 0.94, least=True),
            bar("CPU a row against a plain datasets.map", times["datasets.map"], 1.5, "x"),
            bar("peak memory", max(one.peak for one in found["ours"]), 200, " MB"),
            bar("second run", middle(wall for wall, _ in again["ours"]), 1.5, " s"),
            bar("requests of the second run", max(count for _, count in again["ours"]), 0),
        ]
    )  # fmt: skip


def marginal(options: Options) -> bool:
    """Processor time of a row more: of 10,000 rows less that of 2,000, by so many rows."""
    few, many, found = 2_000, 10_000, dict[str, list[float]]()
    for _ in range(options.runs):
        for client in ("ours", "aiohttp"):
            used = []
            for rows in (few, many):
                with serve(Faults(latency=0.05)) as served, tempfile.TemporaryDirectory() as folder:
                    used.append(run(client, served, Path(folder), options, rows).cpu)
            found.setdefault(client, []).append((used[1] - used[0]) / (many - few) * 1e3)
    middle = {client: statistics.median(times) for client, times in found.items()}
    print(", ".join(f"{client} {time:.3f} ms" for client, time in middle.items()))
    return bar("times that of bare aiohttp", middle["ours"] / middle["aiohttp"], 2.5, "x")


def outages(options: Options) -> bool:
    """Everything is refused for the first 10 s, or for 60 s in the middle."""
    passed = True
    for latency in (0.05, 3.0):
        # Enough rows that all of them take about twelve seconds.
        own = replace(options, rows=int(min(1000, 256 / latency) * 12), timeout=60.0)
        walls = {}
        for breaks, outage in ((0.0, 0.0), (0.0, 10.0), (5.0, 60.0)):
            faults = Faults(latency=latency, breaks=breaks, outage=outage)
            with serve(faults) as served, tempfile.TemporaryDirectory() as folder:
                one = run("ours", served, Path(folder), own)
                walls[outage] = one.wall
                refused = served.stats()["refused"]
            print(
                f"latency {latency} s, refused from {breaks:.0f} s on for {outage:.0f} s: "
                f"{one.rows} of {own.rows} rows in {one.wall:.1f} s, {refused} refusals",
                flush=True,
            )
            passed &= bar("rows lost", own.rows - (one.rows or 0), 0)
            if outage:
                passed &= bar("wall time", one.wall, outage + 1.5 * walls[0.0], " s")
    return passed


def odd(options: Options) -> bool:
    """1 % each of answers without choices, with odd reasons to finish, odd text and odd counts."""
    with serve(Faults(odd=0.01)) as served, tempfile.TemporaryDirectory() as folder:
        one = run("ours", served, Path(folder), options)
        stats = served.stats()
        run("ours", served, Path(folder), options)
        again = served.stats()
    readable = options.rows - again["unreadable"]
    passed = bar("readable rows lost", readable - (one.rows or 0), 0)
    passed &= bar("times the most often asked answer was bought", stats["most_sold"], 3)
    return passed & bar("requests of a second run, to those for what can't be read",
                        again["requests"] - stats["requests"], 3 * again["unreadable"])  # fmt: skip


def kills(options: Options) -> bool:
    """`kill -9` at twenty points of one run, each after some more answers."""
    with serve() as served, tempfile.TemporaryDirectory() as scratch:
        journal, step = Path(scratch) / "run" / "journal.sqlite", options.rows // 21
        allowed = lost = 0
        for point in range(1, 21):
            process = start("ours", served, Path(scratch), options, options.rows)
            while (stored := _answers_in(journal)) < point * step and process.poll() is None:
                time.sleep(0.01)
            allowed += served.stats()["connections"]
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            lost += max(0, stored - _answers_in(journal))
            while served.stats()["in_flight"]:
                time.sleep(0.01)
        last = run("ours", served, Path(scratch), options)
        twice = served.stats()["sold_twice"]
    passed = bar("answers lost that were in the journal", lost, 0)
    passed &= bar("bought twice, at most in flight", twice, allowed)
    return passed & bar("rows in the end", last.rows or 0, options.rows, least=True)


def _answers_in(journal: Path) -> int:
    if not journal.is_file():
        return 0
    with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True, timeout=60)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone():
            return 0
        return int(database.execute("SELECT count(*) FROM answers").fetchone()[0])


def together(options: Options) -> bool:
    """Two, then four processes at once on one folder: one works, the others say so."""
    passed = True
    for count in (2, 4):
        with serve() as served, tempfile.TemporaryDirectory() as scratch:
            processes = [
                start("ours", served, Path(scratch), options, options.rows) for _ in range(count)
            ]
            said = [process.communicate()[1] for process in processes]
            twice = served.stats()["sold_twice"]
        worked = sum(process.returncode == 0 for process in processes)
        told = sum("Another process is at work" in one for one in said)
        print(f"{count} processes: {worked} worked, {told} were told")
        passed &= bar("bought twice", twice, 0) & bar("told", told, count - 1, least=True)
    return passed


def killed(options: Options) -> bool:
    """`kill -9` after half of the answers, then the same command again."""
    passed = True
    for client in CLIENTS:
        with serve() as served, tempfile.TemporaryDirectory() as scratch:
            process = start(client, served, Path(scratch), options, options.rows)
            while served.stats()["answered"] < options.rows // 2:
                time.sleep(0.02)
            stats = served.stats()
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            while served.stats()["in_flight"]:
                time.sleep(0.02)
            abandoned = served.stats()["abandoned"]
            again = run(client, served, Path(scratch), options)
            twice = served.stats()["sold_twice"]
        print(
            f"{client}: {stats['answered']} answered and {stats['connections']} connections open "
            f"at the kill, {abandoned} requests on them unanswered; then {again.rows} rows"
        )
        if client == "ours":
            # A connection has one request at most, which is in flight until its answer is read.
            passed = bar("bought twice, at most in flight", twice, stats["connections"])
            passed &= bar("rows after the second run", again.rows or 0, options.rows, least=True)
        else:
            print(f"        bought twice: {twice}")
    return passed


def growth(options: Options) -> bool:
    """A twentieth of the queries more, after all were answered."""
    more, passed = options.rows + options.rows // 20, True
    for client in CLIENTS:
        with serve() as served, tempfile.TemporaryDirectory() as scratch:
            run(client, served, Path(scratch), options)
            before = served.stats()["requests"]
            grown = run(client, served, Path(scratch), options, more)
            requests = served.stats()["requests"] - before
        print(f"{client}: {requests} requests, {grown.rows} rows")
        if client == "ours":
            passed = bar("requests", requests, more - options.rows)
            passed &= bar("rows", grown.rows or 0, more, least=True)
    return passed


def _all_clients(faults: Faults, options: Options) -> dict[str, tuple[Run, Counter[str]]]:
    found = {}
    for client in CLIENTS:
        with serve(faults) as served, tempfile.TemporaryDirectory() as scratch:
            one = run(client, served, Path(scratch), options)
            found[client] = (one, served.stats())
        why = "" if one.rows is not None else f"; broke off: {one.errors.strip()[-100:]!r}"
        print(
            f"{client}: {one.rows} rows in {one.wall:.1f} s, {one.cpu:.2f} s of CPU, "
            f"{found[client][1]['requests']} requests{why}",
            flush=True,
        )
    return found


def faults(options: Options) -> bool:
    """5 % of requests fail with 500, 5 % with 429, and 1 % hang."""
    with serve() as served, tempfile.TemporaryDirectory() as scratch:
        plain = run("ours", served, Path(scratch), options)
    print(f"ours without faults: {plain.wall:.1f} s")
    one, _ = _all_clients(Faults(errors=0.05, refused=0.05, hangs=0.01), options)["ours"]
    passed = bar("rows lost", options.rows - (one.rows or 0), 0)
    return passed & bar("wall time against none", one.wall / plain.wall, 3.0, "x")


def rejected(options: Options) -> bool:
    """1 % of the prompts are always rejected."""
    one, stats = _all_clients(Faults(rejected=0.01), options)["ours"]
    lost = options.rows - stats["hopeless"] - (one.rows or 0)
    passed = bar("other rows lost", lost, 0)
    return passed & bar("requests for a rejected prompt",
                        stats["hopeless_requests"] / max(stats["hopeless"], 1), 1)  # fmt: skip


def limit(options: Options) -> bool:
    """The server answers 100 requests in any one second, and refuses the others."""
    one, stats = _all_clients(Faults(limit=100), options)["ours"]
    used = options.rows / stats["seconds"] / 100
    passed = bar("rows lost", options.rows - (one.rows or 0), 0)
    passed &= bar("of the limit used", used * 100, 90, " %", least=True)
    return passed & bar("requests refused", stats["refused"] / stats["requests"] * 100, 5, " %")


def straggler(options: Options) -> bool:
    """The first query takes ten seconds."""
    patient = replace(options, timeout=60.0)
    found = _all_clients(Faults(straggler="thing 0", straggles=10.0), patient)
    one, stats = found["ours"]
    lines = [json.loads(line) for line in one.errors.splitlines() if line.startswith("{")]
    shown = [line["done"] for line in lines if line["elapsed_seconds"] < 9.5]
    passed = bar("seconds until all others were answered", stats["seconds_of_others"], 5, " s")
    return passed & bar("rows shown as done meanwhile", max(shown, default=0), options.rows / 4,
                        least=True)  # fmt: skip


SCENARIOS: dict[str, Callable[[Options], bool]] = {
    "throughput": throughput,
    "marginal": marginal,
    "kill": killed,
    "kills": kills,
    "together": together,
    "outages": outages,
    "odd": odd,
    "growth": growth,
    "faults": faults,
    "rejected": rejected,
    "limit": limit,
    "straggler": straggler,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run scenarios; 1 where a bar was not passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SCENARIOS, action="append")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--timeout", type=float, default=5.0)
    parser.add_argument("--runs", type=int, default=3)
    found = vars(parser.parse_args(arguments))
    names = found.pop("only") or list(SCENARIOS)
    failed = []
    for name in names:
        print(f"\n{name}: {SCENARIOS[name].__doc__}", flush=True)
        if not SCENARIOS[name](Options(**found)):
            failed.append(name)
    print(f"\nfailed: {failed}" if failed else "\nall bars passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
