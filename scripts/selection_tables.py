"""Tables of docs/selection.md from scripts/study_selection.py's results.

    python scripts/selection_tables.py collect OUT.json RAW... --environment "..." --model "..."
    python scripts/selection_tables.py show FILE.json...

`collect` keeps the numbers of `accuracy` (.jsonl) and `recall` (.json), without any text. `show`
prints each method beside dense attention on the samples that both have answered: the difference in
points with its standard error, and how many samples it answers better and worse.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def collect(raw: Sequence[Path]) -> dict:
    """accuracy: of each length, task and method the scores in the samples' order; recall: the
    shares of `metrics` by task and method."""
    scores: dict[tuple, dict[int, float]] = defaultdict(dict)
    pages: dict[tuple, list[float]] = defaultdict(list)
    found: dict = {"accuracy": []}
    for path in raw:
        if path.suffix == ".jsonl":
            for record in map(json.loads, path.read_text().splitlines()):
                place = record["length"], record["task"], record["method"]
                scores[place][record["index"]] = round(record["score"], 4)
                pages[place].append(record.get("pages", 0))
            continue
        read = json.loads(path.read_text())
        shares = {
            task: {name: _shares(sums) for name, sums in by_name.items()}
            for task, by_name in read["sums"].items()
        }
        found["recall"] = {"metrics": read["metrics"], "shares": shares}
    for place, by_index in scores.items():
        if sorted(by_index) != list(range(len(by_index))):
            raise SystemExit(f"{place}: samples are missing")
        record = dict(zip(("length", "task", "method"), place, strict=True))
        if any(pages[place]):
            record["pages"] = round(float(np.mean(pages[place])), 2)
        found["accuracy"].append(record | {"scores": [by_index[i] for i in sorted(by_index)]})
    return found


def _shares(sums: list) -> list[float | None]:
    """[layers, metrics, 2] -> a share of each metric, None where there is nothing to find."""
    part, whole = np.array(sums).sum(0).T
    return [round(a / b, 4) if b else None for a, b in zip(part, whole, strict=True)]


def accuracy_tables(records: Sequence[dict]) -> str:
    by_task: dict[tuple, dict[str, list[float]]] = defaultdict(dict)
    for record in records:
        by_task[record["task"], record["length"]][record["method"]] = record["scores"]
    tables = []
    for (task, length), methods in by_task.items():
        lines = [
            f"| {task}, {length // 1024}K | n | accuracy, % | against dense, points | up / down |",
            "|---|---|---|---|---|",
        ]
        for name, scores in methods.items():
            n = min(len(scores), len(methods.get("dense", scores)))
            line = f"| {name} | {n} | {100 * np.mean(scores[:n]):.1f} |"
            if name == "dense" or "dense" not in methods:
                lines.append(f"{line} | |")
                continue
            off = 100 * (np.array(scores[:n]) - np.array(methods["dense"][:n]))
            error = off.std(ddof=1) / n**0.5 if n > 1 else np.nan
            flips = f"{(off > 0).sum()} / {(off < 0).sum()}"
            lines.append(f"{line} {off.mean():+.1f} ± {error:.1f} | {flips} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def recall_table(recall: dict) -> str:
    metrics, shares = recall["metrics"], recall["shares"]
    columns = [(task, metric) for task in shares for metric in metrics]
    names = next(iter(shares.values()))
    # A metric that has nothing to find in a task is no column.
    columns = [(t, m) for t, m in columns if None not in _column(shares[t], metrics.index(m))]
    lines = ["| score | " + " | ".join(f"{t}: {m}" for t, m in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name in names:
        cells = [shares[t][name][metrics.index(m)] for t, m in columns]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def _column(rows: dict[str, list], place: int) -> list:
    return [row[place] for row in rows.values()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    added = commands.add_parser("collect")
    added.add_argument("out", type=Path)
    added.add_argument("raw", type=Path, nargs="+")
    added.add_argument("--environment", required=True, help="GPU and versions")
    added.add_argument("--model", required=True)
    commands.add_parser("show").add_argument("files", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    if options.command == "collect":
        about = {"environment": options.environment, "model": options.model}
        options.out.write_text(_lines(about | collect(options.raw)))
        return
    for path in options.files:
        read = json.loads(path.read_text())
        print(f"{read['environment']}; {read['model']}\n")
        print(accuracy_tables(read["accuracy"]))
        if "recall" in read:
            print(f"\n{recall_table(read['recall'])}")


def _lines(found: dict) -> str:
    """JSON with a line for each method."""
    parts = [f"{json.dumps(key)}: {json.dumps(found[key])}" for key in ("environment", "model")]
    rows = ",\n".join(json.dumps(record) for record in found["accuracy"])
    parts.append(f'"accuracy": [\n{rows}\n]')
    if "recall" in found:
        tasks = [
            f"{json.dumps(task)}: {{\n"
            + ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
            + "\n}"
            for task, rows in found["recall"]["shares"].items()
        ]
        head = f'"recall": {{"metrics": {json.dumps(found["recall"]["metrics"])}, "shares": {{\n'
        parts.append(head + ",\n".join(tasks) + "\n}}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
