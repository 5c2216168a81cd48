"""Pictures of results."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from star_attention.errors import UserError
from star_attention.evals.report import Row
from star_attention.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DEPTHS = 10
# Inches of a picture's width; panels that do not fit go below.
_PAGE = 14


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws what rows of `compare` allow into `folder`; returns the PNG files:

    - accuracy.png: accuracy by length, a line per configuration;
    - retention.png: share of the baseline's accuracy, task by length, a map per configuration;
    - depth.png: share of needles found, needle depth by length, a map per configuration;
    - ablation.png: accuracy and phase 1's time by block and anchor size and selected pages, a
      panel per length.

    Raises:
        UserError: matplotlib is missing, or the folder cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'star-attention-trt[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stars = [row for row in rows if row.is_star]
    pictures: dict[str, Callable[[], Figure]] = {}
    if rows:
        pictures["accuracy"] = lambda: _accuracy(rows)
    if any(row.retention is not None for row in stars):
        pictures["retention"] = lambda: _retention(rows, stars)
    if any(record["depths"] for row in rows for record in row.records):
        pictures["depth"] = lambda: _depth(rows)
    if len({row.label for row in stars}) > 1:
        pictures["ablation"] = lambda: _ablation(stars)
    paths = []
    for name, picture in pictures.items():
        path = folder / f"{name}.png"
        figure = picture()
        picture = io.BytesIO()
        try:
            figure.savefig(picture, dpi=130)
            write_whole(path, picture.getvalue())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        finally:
            plt.close(figure)
        paths.append(path)
    return paths


def _accuracy(rows: Sequence[Row]) -> Figure:
    figure, (ax,) = _panels(1, width=7, height=4.2)
    lengths = _lengths(rows)
    for label in _labels(rows):
        own = {row.length: row.accuracy for row in rows if row.label == label}
        at = [i for i, length in enumerate(lengths) if length in own]
        # A dashed baseline on top, so that lines under it are seen.
        baseline = {"color": "black", "linestyle": "--", "zorder": 3} if label == "dense" else {}
        ax.plot(at, [own[lengths[i]] for i in at], marker="o", label=label, **baseline)
    ax.set_xticks(range(len(lengths)), map(_tick, lengths))
    ax.set_xlabel("tokens")
    ax.set_ylabel("accuracy, %")
    ax.set_ylim(-3, 103)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return figure


def _retention(rows: Sequence[Row], stars: Sequence[Row]) -> Figure:
    """Colours stop at 0 and 120 %; cells whose baseline is 0 are empty."""
    lengths, labels = _lengths(stars), _labels(stars)
    tasks = list(dict.fromkeys(task for row in stars for task in row.tasks))
    figure, axes = _panels(
        len(labels), width=1.5 + 0.45 * len(lengths), height=1 + 0.3 * len(tasks)
    )
    baseline = {row.length: row for row in reversed(rows)}  # the first row of each length
    for ax, label in zip(axes, labels, strict=True):
        cells = np.full((len(tasks), len(lengths)), np.nan)
        for row in stars:
            if row.label == label and row.retention is not None:
                for task, accuracy in row.tasks.items():
                    if base := baseline[row.length].tasks[task]:
                        place = tasks.index(task), lengths.index(row.length)
                        cells[place] = 100 * accuracy / base
        _heat_map(ax, cells, lengths, tasks, 120)
        ax.set_title(f"{label}\nretention, %", fontsize=9)
    return figure


def _depth(rows: Sequence[Row]) -> Figure:
    lengths, labels = _lengths(rows), _labels(rows)
    figure, axes = _panels(len(labels), width=1.5 + 0.45 * len(lengths), height=3.5)
    shares = [f"{100 * i // _DEPTHS}" for i in range(_DEPTHS)]
    for ax, label in zip(axes, labels, strict=True):
        found = np.zeros((_DEPTHS, len(lengths)))
        hidden = np.zeros_like(found)
        for row in (row for row in rows if row.label == label):
            column = lengths.index(row.length)
            for record in row.records:
                # Without needles (aggregation, question answering) there are no depths.
                for output, depth in zip(record["outputs"], record["depths"], strict=False):
                    line = min(int(depth * _DEPTHS), _DEPTHS - 1)
                    hidden[line, column] += 1
                    found[line, column] += output.lower() in record["pred"].lower()
        cells = np.divide(100 * found, hidden, out=np.full_like(found, np.nan), where=hidden > 0)
        _heat_map(ax, cells, lengths, shares, 100)
        ax.set_title(f"{label}\nneedles found, %", fontsize=9)
        ax.set_ylabel("depth from, %")
    return figure


def _ablation(stars: Sequence[Row]) -> Figure:
    lengths = _lengths(stars)
    figure, axes = _panels(len(lengths), width=1.5 + 0.55 * len(_labels(stars)), height=4)
    for ax, length in zip(axes, lengths, strict=True):
        here = [row for row in stars if row.length == length]
        here.sort(key=lambda row: (row.block_size, row.anchor_size, row.selected_pages))
        names = list(map(_ablation_name, here))
        ax.bar(range(len(here)), [row.accuracy for row in here], color="tab:blue", alpha=0.6)
        ax.set_xticks(range(len(here)), names, fontsize=8)
        chosen = "\n+ selected pages" if any(row.selected_pages for row in here) else ""
        ax.set_xlabel(f"block\nanchor, tokens{chosen}")
        ax.set_ylabel("accuracy, % (bars)", color="tab:blue")
        ax.set_ylim(0, 103)
        ax.set_title(f"{_tick(length)} tokens", fontsize=9)
        if not here[0].timed:
            continue
        times = ax.twinx()
        times.plot(range(len(here)), [row.context_seconds for row in here], "o", color="tab:red")
        times.set_ylim(0, 1.1 * max(row.context_seconds for row in here))
        times.set_ylabel("phase 1, seconds (dots)", color="tab:red")
    return figure


def _ablation_name(row: Row) -> str:
    sizes = f"{row.block_size:,}\n{row.anchor_size:,}"
    return f"{sizes}\n+{row.selected_pages}" if row.selected_pages else sizes


def _heat_map(
    ax: Axes, cells: np.ndarray, lengths: Sequence[int | None], names: Sequence[str], top: int
) -> None:
    ax.imshow(np.clip(cells, 0, top), cmap="RdYlGn", vmin=0, vmax=top, aspect="auto")
    ax.set_xticks(range(len(lengths)), map(_tick, lengths), fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    for (line, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            ax.text(column, line, f"{value:.0f}", ha="center", va="center", fontsize=8)


def _panels(count: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib import pyplot as plt

    columns = min(count, max(1, int(_PAGE / width)))
    lines = -(-count // columns)
    size = width * columns, height * lines
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for unused in axes.flat[count:]:
        unused.set_axis_off()
    return figure, axes.flat[:count]


def _lengths(rows: Sequence[Row]) -> list[int | None]:
    return list(dict.fromkeys(row.length for row in rows))


def _labels(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.label for row in rows))


def _tick(length: int | None) -> str:
    if length is None:
        return "whole"
    return f"{length >> 10}K" if length % 1024 == 0 else f"{length:,}"
