"""Asks a small model about one sentence in a long text, with and without Star Attention.

SmolLM2-135M-Instruct reads 4K tokens that hide one number: dense attention on all cores, then Star
Attention over four ranks with the paper's anchor, a quarter of it, and none.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

RANKS, BLOCK, LINES = 4, 1024, 158
OPENING = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
)
HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic numbers for long-lantern is: 7463343."
QUESTION = "What is the special magic number for long-lantern mentioned in the provided text?"
NUMBER = "7463343"
STAR = ["--ranks", str(RANKS), "--oversubscribe", "--block-size", str(BLOCK)]
RUNS = {
    "dense, one rank": ["--attention", "dense"],
    f"star, anchor {BLOCK}": [*STAR, "--anchor-size", str(BLOCK)],
    f"star, anchor {BLOCK // 4}": [*STAR, "--anchor-size", str(BLOCK // 4)],
    "star, no anchor": [*STAR, "--anchor-size", "0"],
}


def star_attn(*arguments: str, show: bool = True, **options) -> subprocess.CompletedProcess:
    if show:
        click.secho(f"\n$ star-attn {' '.join(arguments)}", bold=True)
    command = [sys.executable, "-m", "star_attention", *arguments]
    return subprocess.run(command, check=True, text=True, **options)


def main() -> None:
    haystack = Path(tempfile.mkdtemp(prefix="star-attention-demo-")) / "haystack.txt"
    lines = [HAY] * LINES
    lines.insert(LINES // 3, NEEDLE)
    haystack.write_text("\n".join([OPENING, *lines]))
    print(f"{haystack}: {haystack.stat().st_size:,} bytes, a third down in them:\n  {NEEDLE}")
    star_attn(
        "plan", "--context", "4K", "--block-size", str(BLOCK), *STAR[:2], "--model", "smollm2"
    )

    ask = ["ask", "--model", "smollm2", "--context-file", str(haystack), "--max-tokens", "24"]
    click.secho(f"\n$ star-attn {' '.join(ask)} ...", bold=True)
    print(f"  {QUESTION}")
    table = Table("attention", "found", "answer")
    for title in ("phase 1", "phase 2", "in all"):
        table.add_column(title, justify="right")
    found = []
    for name, options in RUNS.items():
        begin = time.perf_counter()
        run = star_attn(
            *ask, "--question", QUESTION, *options, "--json", show=False, stdout=subprocess.PIPE
        )
        total = time.perf_counter() - begin
        result = json.loads(run.stdout)
        phases = [
            {name: phase["seconds"] for name, phase in rank["phases"].items()}
            for rank in result["ranks"]
        ]
        answer = result["answers"][0]["text"].strip()
        found.append(NUMBER in answer)
        table.add_row(
            name,
            "[green]yes[/]" if found[-1] else "[red]no[/]",
            f"... {answer[-12:]}",
            f"{max(phase['context'] for phase in phases):.1f} s",
            f"{max(phase['question'] + phase['decode'] for phase in phases):.1f} s",
            f"{total:.1f} s",
        )
        print(f"  {name}: {answer}")
    Console().print(table)
    print(
        "phase 1: reading the text; phase 2: question and answer; in all: with loading the model."
    )
    if found == [True, True, True, False]:
        print("Star Attention keeps the answer, and the anchor is what does it.")
    else:
        sys.exit("Expected: all find the number but the one without an anchor.")


main()
