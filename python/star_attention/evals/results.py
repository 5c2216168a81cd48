"""The results folder: of each configuration one JSON Lines file of predictions and one JSON file
of scores."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from star_attention.errors import UserError
from star_attention.files import write_whole

# A sample within a configuration: length, task, index.
Key = tuple[int | None, str, int | str]
# What all configurations of a folder have in common.
_SHARED = ("benchmark", "model", "template", "device", "dtype", "quantization", "seed", "data")


@dataclass
class Results:
    """Answers of one configuration, by sample.

    Attributes:
        path: its predictions, `<folder>/<name>.jsonl`; the scores are beside it, `<name>.json`.
        configuration: what it was run with.
        records: the newest line of each sample: `score` 0 to 1, or `error`; seconds if timed.
    """

    path: Path
    configuration: dict[str, Any]
    records: dict[Key, dict[str, Any]]

    @property
    def label(self) -> str:
        return label(self.configuration)

    @property
    def finished(self) -> dict[Key, dict[str, Any]]:
        return {key: record for key, record in self.records.items() if "error" not in record}

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line, whole or not at all."""
        self.records[_key(record)] = record
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                if file.write(line) < len(line):
                    file.truncate(before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _cannot_be_used(self.path.parent, error) from None

    def write_scores(self) -> None:
        """Replaces the scores file: mean score in per cent and median seconds of each task."""
        cells: dict[tuple[int | None, str], list[dict[str, Any]]] = {}
        for (length, task, _), record in self.records.items():
            cells.setdefault((length, task), []).append(record)
        scores = []
        for (length, task), records in cells.items():
            good = [record for record in records if "error" not in record]
            times = [record["seconds"] for record in good if "seconds" in record]
            scores.append(
                {
                    "length": length,
                    "task": task,
                    "samples": len(good),
                    "failed": len(records) - len(good),
                    "score": round(100 * mean(r["score"] for r in good), 2) if good else None,
                    "seconds": round(median(times), 3) if times else None,
                }
            )
        content = {"configuration": self.configuration, "scores": scores}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        try:
            write_whole(self.path.with_suffix(".json"), text.encode())
        except OSError as error:
            raise _cannot_be_used(self.path.parent, error) from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other evaluations out of a results folder, at the longest until this process ends.

    Raises:
        UserError: another one is writing there, or the folder cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("ab")
    except OSError as error:
        raise _cannot_be_used(folder, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--results {folder}: another star-attn eval is writing there: wait until it is "
                "over, or use another folder"
            ) from None
        except OSError as error:
            raise _cannot_be_used(folder, error) from None
        yield


def open_results(folder: Path, configuration: dict[str, Any]) -> Results:
    """The results of a configuration so far, ready to go on. A last line that was cut off when a
    run was killed is removed.

    Raises:
        UserError: the folder holds results of another benchmark, model or the like.
    """
    path = folder / f"{_file_name(configuration)}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for other in sorted(folder.glob("*.json")):
            _check_same(other, configuration, _SHARED if other.stem != path.stem else None)
        if path.exists():
            whole = path.read_bytes()
            os.truncate(path, whole.rfind(b"\n") + 1)
    except OSError as error:
        raise _cannot_be_used(folder, error) from None
    results = Results(path, configuration, _read(path))
    results.write_scores()
    return results


def load_results(folder: Path) -> list[Results]:
    """All configurations of a folder: dense, ring, then star by falling sizes and rising numbers of
    selected pages.

    Raises:
        UserError: there are none.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        lines = path.with_suffix(".jsonl")
        found.append(Results(lines, _configuration(path), _read(lines)))
    if not found:
        raise UserError(f"{folder} holds no results: run star-attn eval first")
    return sorted(found, key=_order)


def label(configuration: dict[str, Any]) -> str:
    """How a configuration is called in tables and plots: star with its block and anchor size, and
    its selected pages if there are any."""
    if configuration["attention"] != "star":
        return configuration["attention"]
    pages = selected_pages(configuration)
    sizes = f"{configuration['block_size']}/{configuration['anchor_size']}"
    return f"star {sizes}+{pages}" if pages else f"star {sizes}"


def selected_pages(configuration: dict[str, Any]) -> int:
    """Results without selected pages do not name them."""
    return configuration.get("selected_pages", 0)


def _cannot_be_used(folder: Path, error: OSError) -> UserError:
    return UserError(f"--results {folder} cannot be used: {error.strerror}")


def _order(results: Results) -> tuple:
    sizes = [results.configuration[name] for name in ("block_size", "anchor_size")]
    words = ("whole", "block", "half", "quarter", "eighth", "page")
    places = [(0, words.index(size)) if size in words else (1, -int(size or 0)) for size in sizes]
    method = ("dense", "ring", "star").index(results.configuration["attention"])
    return method, places, selected_pages(results.configuration)


def _file_name(configuration: dict[str, Any]) -> str:
    return label(configuration).replace(" ", "-").replace("/", "-")


def _check_same(path: Path, configuration: dict[str, Any], keys: tuple[str, ...] | None) -> None:
    known = _configuration(path)
    for key in keys or configuration:
        if known.get(key) != configuration.get(key):
            raise UserError(
                f"{path} was made with {key} {known.get(key)}, not {configuration.get(key)}: "
                "use another --results folder"
            )


def _configuration(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))["configuration"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is not of star-attn eval: use another --results folder") from None


def _read(path: Path) -> dict[Key, dict[str, Any]]:
    """The records of a file, without a last line that is cut off."""
    if not path.exists():
        return {}
    records = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            records[_key(record)] = record
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}, line {number} is damaged: remove the line") from None
    return records


def _key(record: dict[str, Any]) -> Key:
    return record["length"], record["task"], record["index"]
