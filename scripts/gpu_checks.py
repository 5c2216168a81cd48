#!/usr/bin/env python3
"""Checks of the CUDA code that need a GPU. Prints one table, line by line as results come:

    scripts/gpu_checks.sh [PART ...]

fuzz: random shapes of every operator against the reference (tests/gpu/fuzz_shapes.py).
memcheck, racecheck: the same on small shapes, under compute-sanitizer. Every tensor is then an
    allocation of its own, with padding behind it. racecheck leaves out skinny_linear and
    context_sm90, as it takes what a barrier counts, or blocks of a cluster share, for races, and
    cuBLAS, whose kernels end in an illegal access under it.
gate: scripts/bench_attention.py without peers. Each kernel's share of the ceiling that is measured
    beside it is compared with the share in benchmarks/gate.json: below 0.95 of it twice in a row,
    the gate fails. With several GPUs, merging over two ranks too, whose ceiling is NCCL's time.
peer: a rank is killed while the others wait for it.
tests: tests/gpu, file by file.

Without PART all run, in this order. What fails is printed on stderr, in full in the folder of logs.
`benchmarks/results/gate_<gpu>.json` has the table and the ratios. The exit code is 0 if nothing
failed and all that was asked for could run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
STORED = REPOSITORY / "benchmarks/gate.json"
FLOOR = 0.95
RANKS = "merge over 2 ranks"
PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "FAILED", "skipped", "not run"


@dataclass
class Result:
    check: str
    outcome: str
    detail: str
    seconds: float

    def line(self) -> str:
        detail = f"{self.outcome}: {self.detail}".replace("|", "/")
        return f"| {self.check} | {detail} | {self.seconds:.0f} |"


@dataclass
class Run:
    """A command that has ended, or was ended because its time was over."""

    code: int | None
    lines: list[str]
    seconds: float

    def result(self, check: str, detail: str = "") -> Result:
        detail = detail or self.last()
        if self.code is None:
            detail = f"no end after {self.seconds:.0f} s; {detail}"
        return Result(check, PASSED if self.code == 0 else FAILED, detail, self.seconds)

    def last(self, pattern: str = r"\S") -> str:
        """The last line with it."""
        found = (line.strip(" =\n") for line in reversed(self.lines) if re.search(pattern, line))
        return next(found, "no output")[:200]


@dataclass
class Checks:
    logs: Path
    output: Path
    seed: int
    until: float  # time.monotonic() at which all ends
    gpus: int
    gpu: str
    store: bool = False
    environment: Mapping[str, object] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    ratios: dict[str, dict] = field(default_factory=dict)

    def add(self, result: Result) -> None:
        """Shows and writes it."""
        print(result.line(), flush=True)
        self.results.append(result)
        report = {
            "environment": self.environment,
            "seed": self.seed,
            "checks": [asdict(each) for each in self.results],
            "ratios": self.ratios,
        }
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(report, indent=1) + "\n")

    def left(self, limit: float = float("inf")) -> float:
        return min(limit, self.until - time.monotonic())

    def run(
        self,
        name: str,
        command: list[str],
        limit: float,
        on_line: Callable[[str], None] = lambda line: None,
        **environment: str,
    ) -> Run:
        began, lines = time.monotonic(), []
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(0.0, self.left(limit)), end)
        timer.start()
        with process.stdout, (self.logs / f"{name}.log").open("w") as log:
            for line in process.stdout:
                log.write(line)
                lines.append(line)
                on_line(line)
        code = process.wait()
        timer.cancel()
        if code:
            print(f"--- {name}", *map(str.rstrip, lines[-30:]), sep="\n", file=sys.stderr)
        return Run(None if late.is_set() else code, lines, time.monotonic() - began)


def fuzz_command(seconds: float, seed: int, *options: str) -> list[str]:
    fuzz = "tests/gpu/fuzz_shapes.py", "--seconds", str(seconds), "--seed", str(seed)
    return [sys.executable, *fuzz, *options]


def fuzz(checks: Checks) -> None:
    checks.add(checks.run("fuzz", fuzz_command(45, checks.seed), 120).result("fuzz"))


def sanitizer(
    checks: Checks, name: str, tool: str, *options: str, fuzzed: Iterable[str] = ()
) -> Result:
    found = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if found is None:
        return Result(name, NOT_RUN, "no compute-sanitizer, which CUDA's toolkit has", 0)
    common = {"tool": tool, "target-processes": "application-only", "launch-timeout": "120"}
    common |= {"report-api-errors": "no", "error-exitcode": "99"}
    arguments = [part for key, value in common.items() for part in (f"--{key}", value)]
    run = checks.run(
        name.replace(" ", "_"),
        [found, *arguments, *options, *fuzz_command(30, checks.seed, "--small", *fuzzed)],
        150,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    return run.result(name, f"{run.last('SUMMARY|Error')}; {run.last('^seed')}")


def memcheck(checks: Checks) -> None:
    ours = "--kernel-name", "kns=star_attention"
    checks.add(sanitizer(checks, "memcheck", "memcheck", *ours, "--padding", "512"))


def racecheck(checks: Checks) -> None:
    """Kernels that are not checked must not run either: some end in an illegal access then."""
    import torch

    ours = "--kernel-name", "kns=star_attention"
    fuzzed = "--without", "linear", "--kernels", "query_sm80", "context_sm80"
    checks.add(sanitizer(checks, "racecheck", "racecheck", *ours, fuzzed=fuzzed))
    if torch.cuda.get_device_capability() == (9, 0):
        fuzzed = "--only", "paged_attention", "--kernels", "query_sm90"
        checks.add(sanitizer(checks, "racecheck of sm_90a", "racecheck", *ours, fuzzed=fuzzed))


def peer(checks: Checks) -> None:
    killed = "tests/gpu/test_engine.py", "-k", "one_rank_fails and kill"
    lost = "tests/gpu/test_comm.py", "-k", "lost"
    for name, tests in (("a killed rank", killed), ("a lost peer in a merge", lost)):
        run = checks.run(name.replace(" ", "_"), [*pytest_command(), *tests], 120)
        result = run.result(name)
        if run.code == 0 and " passed" not in result.detail:
            result.outcome = SKIPPED
        checks.add(result)


def tests(checks: Checks) -> None:
    files = FileResults(checks)
    run = checks.run("tests", [*pytest_command(), "-v", "tests/gpu"], float("inf"), files.line)
    files.end(run)


def pytest_command() -> list[str]:
    return [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider"]


class FileResults:
    """Reads the lines of `pytest -v`; adds a result as soon as a file's tests have ended."""

    def __init__(self, checks: Checks) -> None:
        self.checks = checks
        self.path: str | None = None
        self.counts: Counter[str] = Counter()
        self.test = ""
        self.skipped: list[Result] = []  # whole files
        self.began = self.ended = time.monotonic()

    def line(self, line: str) -> None:
        if started := re.match(r"(\S+\.py)::", line):
            if started[1] != self.path:
                self.finish()
                self.path, self.counts, self.began = started[1], Counter(), self.ended
            self.test = line.strip()
        if ended := re.search(rf"\b({self.OUTCOMES})( \(.*)?\s+\[ *\d+%\]$", line.rstrip()):
            self.counts[ended[1].lower()] += 1
            self.ended = time.monotonic()
        if missing := re.match(r"SKIPPED \[\d+\] (\S+\.py):\d+: (could not import .*)", line):
            self.skipped.append(Result(missing[1], SKIPPED, missing[2][:200], 0))

    OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"

    def finish(self, cut: str = "") -> None:
        if self.path is None:
            return
        detail = ", ".join(f"{count} {kind}" for kind, count in self.counts.items()) + cut
        outcome = PASSED if self.counts["passed"] else SKIPPED
        if cut or self.counts["failed"] or self.counts["error"]:
            outcome = FAILED
        self.checks.add(Result(self.path, outcome, detail, self.ended - self.began))

    def end(self, run: Run) -> None:
        late = run.code is None
        self.finish(f"; no time left in {self.test}" if late else "")
        for result in self.skipped:
            self.checks.add(result)
        if self.path is None or not (late or run.code in (0, 1)):
            self.checks.add(run.result("tests/gpu"))  # it did not begin, or broke


# The gate


def ratios(report: Mapping) -> dict[str, float]:
    """Of a report of bench_attention.py: each kernel's share of its row's ceiling. Of what moves
    memory that is a read of 4 GiB: copies in CUDA graphs are slower for some sizes."""
    bench = _bench()
    found = {}
    for phase in bench.PHASES:
        for row in report.get(phase, ()):
            times = row["milliseconds"]
            if "copy" in times:
                rate = report["ceilings"].get("read_tbps")
                ceiling = row["work"] / rate * 1e-9 if rate else 0
            else:
                ceiling = min((times[name] for name in bench.CEILINGS if name in times), default=0)
            shape = ", ".join(map(str, row["shape"].values()))
            for name in ("ours", bench.SM80):
                if ceiling and name in times:
                    found[f"{phase} {shape}: {name}"] = ceiling / times[name]
    return found


def rank_ratios(lines: list[str]) -> dict[str, float]:
    """Of `comm_job.py bench`: NCCL's time over that of peer memory."""
    times: dict[str, dict[str, float]] = {}
    for line in lines:
        if found := re.match(r"(peer|nccl)\s+(\w+)\s+(\d+) tokens\s+([\d.]+) us", line):
            times.setdefault(f"{found[2]}, {found[3]} tokens", {})[found[1]] = float(found[4])
    return {
        f"{RANKS}, {shape}": pair["nccl"] / pair["peer"]
        for shape, pair in times.items()
        if len(pair) == 2
    }


def judge(
    measured: Mapping[str, float], stored: Mapping[str, float], floor: float = FLOOR
) -> dict[str, dict]:
    """`state` of each kernel and shape: ok, below the floor, missing from what was measured, or
    new, of which nothing is stored."""

    def state(name: str) -> str:
        if name not in stored:
            return "new"
        if name not in measured:
            return "missing"
        return "ok" if measured[name] >= floor * stored[name] else "below"

    return {
        name: {"measured": measured.get(name), "stored": stored.get(name), "state": state(name)}
        for name in dict.fromkeys([*stored, *measured])
    }


def summary(judged: Mapping[str, Mapping]) -> tuple[str, str]:
    """Outcome and a line about it."""
    counts = Counter(each["state"] for each in judged.values())
    detail = ", ".join(f"{count} {state}" for state, count in counts.items())
    bad = [
        f"{name} {each['measured']:.2f} of {each['stored']:.2f}"
        if each["state"] == "below"
        else f"{name} was not measured"
        for name, each in judged.items()
        if each["state"] in ("below", "missing")
    ]
    if bad:
        return FAILED, f"{detail}: {'; '.join(bad)}"
    if not counts["ok"]:
        return NOT_RUN, "no ratios are stored for this GPU: keep these with --store"
    return PASSED, detail


def gate(checks: Checks) -> None:
    began = time.monotonic()
    kept = json.loads(STORED.read_text())
    stored = kept.get(checks.gpu, {})
    if checks.gpus == 1:
        stored = {name: ratio for name, ratio in stored.items() if not name.startswith(RANKS)}
    measured = measure(checks, list(_bench().PHASES))
    judged = judge(measured, stored)
    again = {
        name.split()[0] for name, each in judged.items() if each["state"] in ("below", "missing")
    }
    if again and not checks.store and checks.left() > 60:
        for name, ratio in measure(checks, [p for p in _bench().PHASES if p in again]).items():
            measured[name] = max(ratio, measured.get(name, 0.0))
        judged = judge(measured, stored)
    checks.ratios = judged
    outcome, detail = summary(judged)
    if checks.store and measured:
        kept[checks.gpu] = kept.get(checks.gpu, {}) | {
            name: round(ratio, 3) for name, ratio in measured.items()
        }
        STORED.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        detail = f"{len(measured)} ratios stored; before: {detail}"
        outcome = PASSED
    checks.add(Result("gate", outcome, detail, time.monotonic() - began))


def measure(checks: Checks, phases: list[str]) -> dict[str, float]:
    output = checks.logs / "bench.json"
    output.unlink(missing_ok=True)
    bench = "scripts/bench_attention.py", "--no-peers", "--output", str(output)
    checks.run("bench", [sys.executable, *bench, "--phases", *phases], 300)
    found = ratios(json.loads(output.read_text())) if output.exists() else {}
    if checks.gpus > 1 and "merge" in phases:
        from star_attention.distributed.launch import mpirun_command

        job = sys.executable, "tests/gpu/comm_job.py", "bench"
        run = checks.run("bench_ranks", [*mpirun_command(2, oversubscribe=True), *job], 60)
        found |= rank_ratios(run.lines)
    return found


@functools.cache
def _bench():
    sys.path.insert(0, str(Path(__file__).parent))
    import bench_attention

    return bench_attention


PARTS: dict[str, Callable[[Checks], None]] = {
    part.__name__: part for part in (fuzz, memcheck, racecheck, gate, peer, tests)
}


# Output


def short_name(device: str, known: Mapping[str, object]) -> str:
    """Of a GPU, as torch calls it: a name that ratios are stored for, or a new one."""
    words = re.findall(r"[A-Za-z0-9]+", device.removeprefix("NVIDIA"))
    return next((name for name in known if name in words), "_".join(words[:3]) or "unknown")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=15, help="after which all ends (15)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of shapes")
    parser.add_argument("--logs", type=Path, help="folder of logs, a new one if not given")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--store", action="store_true", help="keep this GPU's ratios for the gate")
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]}: there are {', '.join(PARTS)}")
    import torch

    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    try:
        import star_attention.ops.cuda  # noqa: F401
    except ImportError as error:
        parser.error(str(error))

    device, known = torch.cuda.get_device_name(), json.loads(STORED.read_text())
    gpu, gpus = short_name(device, known), torch.cuda.device_count()
    checks = Checks(
        options.logs or Path(tempfile.mkdtemp(prefix="gpu_checks_")),
        options.output or REPOSITORY / f"benchmarks/results/gate_{gpu.lower()}.json",
        options.seed,
        time.monotonic() + 60 * options.minutes,
        gpus,
        gpu,
        options.store,
        _bench().environment() | {"gpus": gpus},
    )
    checks.logs.mkdir(parents=True, exist_ok=True)
    print(f"{gpus} x {device}, seed {checks.seed}, logs in {checks.logs}\n")
    print("| check | result | seconds |\n|---|---|---|", flush=True)
    for name in options.parts or PARTS:
        if checks.left() < 20:
            checks.add(Result(name, NOT_RUN, "no time left", 0))
        else:
            PARTS[name](checks)
    outcomes = Counter(result.outcome for result in checks.results)
    print("", ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()), sep="\n")
    return 1 if outcomes[FAILED] or outcomes[NOT_RUN] else 0


if __name__ == "__main__":
    sys.exit(main())
