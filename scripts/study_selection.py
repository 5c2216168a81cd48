"""Which score of pages keeps dense attention's answers: a study on RULER's tasks.

    python scripts/study_selection.py check
    python scripts/study_selection.py prepare --model M --tasks vt --samples 40 --out DATA
    python scripts/study_selection.py recall --model M --data DATA --scores max,mean16 --out FILE
    python scripts/study_selection.py accuracy --model M --data DATA --steps FILE --out FILE

`prepare` writes samples as tokens, and the tokenizer. `recall` reads a few contexts densely and
asks in every layer what each score would have chosen: which share of the pages that `max` takes
(`top`) and of their largest probabilities (`max`), of strong links, probabilities of a tenth or
more (`strong`), of all attention to earlier blocks (`mass`), and of the largest probabilities from
a needle to earlier ones (`link`). `accuracy` reads with each method and answers over all KV; its
steps are lines `LENGTH SAMPLES TASKS METHODS`, such as `16384 100 vt dense,star,mean16`. `check`
compares a GPU's attention and choices with the CPU's. Methods and scores:
scripts/selection_methods.py. Results are written as they come, and what an --out of `accuracy`
holds is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from selection_methods import (
    Inputs,
    KvHeads,
    Method,
    OneRank,
    StudyAttention,
    attend_densely,
    lists_of,
    scores_of,
)
from selection_model import PAGE, Reader
from selection_samples import Tokens, load, max_tokens, prepare, score

from star_attention.evals.prompts import PromptTokenizer
from star_attention.models.checkpoint import find_model
from star_attention.models.tokenizer import Tokenizer, save_tokenizer
from star_attention.ops import select_reference as select

STRONG = 0.1
METRICS = ("top", "max", "strong", "mass", "link")
CHECKED = (
    "dense,star,max,mass,all.local,random,nearest,diagonal16,flash,quest16,mean16,mean16.rows4,"
    "mean16.heads4,mean16.rough,mean16>all.local"
)
_BEGIN = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _BEGIN:6.1f} s] {text}", flush=True)


class RecallAttention(OneRank):
    """Attends densely and adds up, layer by layer, what each method would have chosen.

    Args:
        sums: method -> float64 [layers, metrics, 2], the chosen and all there is.
        sample: the context that is read.
    """

    def __init__(
        self,
        methods: list[Method],
        sums: dict[str, torch.Tensor],
        scale: float,
        sample: Tokens,
        length: int,
    ) -> None:
        super().__init__(scale)
        self._methods, self._sums = methods, sums
        self._sample, self._length = sample, length
        self._layer = 0

    def __call__(self, q: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        o, lse = attend_densely(q, pool, self._scale)
        if self._layer:  # the first layer's keys know nothing but their own token
            tokens = len(self._sample.context)
            q[tokens:], lse[tokens:] = q[tokens - 1], lse[tokens - 1]
            self._measure(q, pool, self._layer, lse)
        self._layer += 1
        return o

    def _measure(self, q: torch.Tensor, pool: torch.Tensor, layer: int, full: torch.Tensor) -> None:
        division = self._methods[0].division(len(q), self._length, PAGE)
        heads = KvHeads(pool[: division.pages])
        keys = heads.keys
        local = heads.attend(q, division, None, self._scale)[1]
        lse = {"full": full, "local": local}
        inputs = Inputs(layer, q, keys, lse, self._scale)
        largest, mass = (scores_of(name, inputs, division).exp() for name in ("max", "mass"))
        allowed = division.candidates(q.device)
        links = self._links(division, q.device)
        for method in self._methods:
            mask = select.chosen_mask(*self._at_tile(method, inputs, division), division.pages)
            best = select.chosen_mask(
                *select.choose(largest.masked_fill(~allowed, -torch.inf), method.pages),
                division.pages,
            )
            strong = largest >= STRONG
            pairs = [
                ((mask & best).sum(), best.sum()),
                (largest[mask].sum(), largest[best].sum()),
                ((mask & strong).sum(), strong.sum()),
                (mass[mask].sum(), mass.sum()),
                ((largest * mask * links).sum(), (largest * links).sum()),
            ]
            found = torch.stack([torch.stack([x.double() for x in pair]) for pair in pairs])
            self._sums[method.name][layer] += found

    def _at_tile(
        self, method: Method, inputs: Inputs, division: select.Division
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A method's lists for tiles of the first method's size."""
        own = method.division(division.tokens, self._length, PAGE)
        lists = lists_of(method, inputs, own)
        factor = own.tile // division.tile
        return tuple(x.repeat_interleave(factor, 1) for x in lists)

    def _links(self, division: select.Division, device: torch.device) -> torch.Tensor:
        """bool [tiles, pages]: from a needle's lines back to earlier needles'."""
        links = torch.zeros(division.tiles, division.pages, dtype=torch.bool, device=device)
        for index, later in enumerate(self._sample.needles):
            for earlier in self._sample.needles[:index]:
                links[later // division.tile, earlier // PAGE] = True
        return links & division.candidates(device)


def run_recall(options: argparse.Namespace) -> None:
    reader = Reader(options.model, options.device, 1, options.length)
    say("model loaded")
    methods = [Method.parse(name) for name in options.scores]
    args = reader.config.num_layers, len(METRICS), 2
    results: dict[str, dict] = {}
    for task in options.tasks:
        sums = defaultdict(lambda: torch.zeros(args, dtype=torch.float64, device=reader.device))
        samples = load(options.data, task, options.length)[: options.samples]
        for sample in samples:
            if _late(options):
                break
            attention = RecallAttention(
                methods,
                sums,
                reader.scale,
                sample,
                options.length,
            )
            reader.read(0, sample.context, attention, _unit(methods))
        if not sums:
            break
        results[task] = {name: values.cpu().tolist() for name, values in sums.items()}
        options.out.write_text(json.dumps({"metrics": METRICS, "sums": results}))
        say(f"{task}: {len(samples)} contexts; shares of {', '.join(METRICS)}")
        for name, values in sums.items():
            part, whole = values.sum(0).unbind(-1)
            shares = part / whole
            print(f"  {name:44}" + "".join(f"{share:8.3f}" for share in shares.tolist()))


def run_accuracy(options: argparse.Namespace) -> None:
    tokenizer = Tokenizer(options.data / "tokenizer", "none")
    steps = _steps(options.steps)
    longest = max(length for length, *_ in steps)
    reader = Reader(options.model, options.device, options.batch, longest)
    ends = frozenset((*reader.config.eos_token_ids, *tokenizer.eos_token_ids))
    say(f"model loaded, {_machine(reader.device)}")
    done = _done(options.out)
    for length, count, task, names in steps:
        samples = list(enumerate(load(options.data, task, length)))[:count]
        for name in names:
            method = Method.parse(name)
            pending = [each for each in samples if (length, task, name, each[0]) not in done]
            begin = time.perf_counter()
            for first in range(0, len(pending), options.batch):
                if _late(options):
                    say("the budget is spent")
                    return
                batch = pending[first : first + options.batch]
                records = _answer(reader, method, batch, task, length, ends)
                with options.out.open("a") as out:
                    for record in records:
                        text = tokenizer.decode(record.pop("tokens"))
                        record |= {"pred": text, "score": score(task, text, record["outputs"])}
                        done[length, task, name, record["index"]] = record["score"]
                        out.write(json.dumps(record) + "\n")
            got, dense = (
                np.array([done.get((length, task, each, index), np.nan) for index, _ in samples])
                for each in (name, "dense")
            )
            off = (
                f"{np.mean(got - dense):+.3f}, {(got > dense).sum()} up {(got < dense).sum()} down"
            )
            seconds = time.perf_counter() - begin
            place = f"{length // 1024}K {task:16} {name:32}"
            say(f"{place} {got.mean():.3f}  {off}  n={len(got)}  {seconds:.1f} s")


def _answer(
    reader: Reader,
    method: Method,
    batch: list[tuple[int, Tokens]],
    task: str,
    length: int,
    ends: frozenset[int],
) -> list[dict]:
    pages = []
    for place, (_, sample) in enumerate(batch):
        attention = StudyAttention(method, reader.scale, len(sample.context), length)
        reader.read(place, sample.context, attention, _unit([method]))
        pages.append(round(attention.pages(), 2))
    answers = reader.answer(
        [len(sample.context) for _, sample in batch],
        [sample.question for _, sample in batch],
        max_tokens(task),
        ends,
    )
    return [
        {
            "task": task,
            "length": length,
            "method": method.name,
            "index": index,
            "pages": count,
            "outputs": sample.outputs,
            "tokens": tokens,
        }
        for (index, sample), tokens, count in zip(batch, answers, pages, strict=True)
    ]


def _unit(methods: list[Method]) -> int:
    """Tokens that contexts are padded to a multiple of."""
    return max(PAGE, *(method.tile for method in methods))


def _steps(path: Path) -> list[tuple[int, int, str, list[str]]]:
    """Length, samples, task and methods."""
    lines = [line.split() for line in path.read_text().splitlines() if line and line[0] != "#"]
    return [
        (int(length), int(samples), task, methods.split(","))
        for length, samples, tasks, methods in lines
        for task in tasks.split(",")
    ]


def _done(path: Path) -> dict[tuple[int, str, str, int], float]:
    if not path.exists():
        return {}
    records = map(json.loads, path.read_text().splitlines())
    keys = "length", "task", "method", "index"
    return {tuple(each[key] for key in keys): each["score"] for each in records}


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}"


def _late(options: argparse.Namespace) -> bool:
    return time.perf_counter() - _BEGIN > options.budget_seconds


def run_check(options: argparse.Namespace) -> None:
    """Every score on random vectors, on the GPU and the CPU."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2048, 4, 128, generator=generator).bfloat16()
    pool = torch.randn(16, 2, 2, 128, 128, generator=generator).bfloat16()
    for name in options.methods:
        method = Method.parse(name + "/pages=4/anchor=128" * (name not in ("dense", "star")))
        outputs = []
        for device, dtype in ((options.device, torch.bfloat16), ("cpu", torch.float32)):
            attention = StudyAttention(method, 128**-0.5, 2000, 2048)
            on_device = (x.to(device, dtype, copy=True) for x in (q, pool))
            outputs.append(attention(*on_device)[:2000].float().cpu())
        off = (outputs[0] - outputs[1]).abs().flatten(1).amax(1)
        shares = f"{(off > 0.03).float().mean():.4f} of rows differ by more than 0.03"
        say(f"{name:28} largest difference {off.max():.4f}, {shares}")


def run_prepare(options: argparse.Namespace) -> None:
    path = find_model(options.model)
    prompts = PromptTokenizer(path)
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "tokenizer").exists():
        save_tokenizer(path, options.out / "tokenizer")
    for task in options.tasks:
        prepare(prompts, task, options.length, options.samples, options.data_dir, options.out)
        say(f"{task}: {options.samples} samples of {options.length} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def names(text: str) -> list[str]:
        return text.split(",")

    def command(name: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name)
        added.add_argument("--model", default="smollm2")
        added.add_argument("--out", type=Path, required=True)
        return added

    def samples(added: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added.add_argument("--length", type=int, default=16384)
        added.add_argument("--tasks", type=names, default=["vt"])
        added.add_argument("--samples", type=int, default=40)
        return added

    def run(added: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        added.add_argument("--budget-seconds", type=float, default=1e9)
        return added

    prepared = samples(command("prepare"))
    prepared.add_argument("--data-dir", type=Path, help="RULER's files: docs/evals.md")
    recall, accuracy = samples(run(command("recall"))), run(command("accuracy"))
    for added in (recall, accuracy):
        added.add_argument("--data", type=Path, required=True, help="prepare's --out")
    recall.add_argument("--scores", type=names, required=True)
    accuracy.add_argument("--steps", type=Path, required=True)
    accuracy.add_argument("--batch", type=int, default=40, help="samples that answer together")
    check = run(commands.add_parser("check"))
    check.add_argument("--methods", type=names, default=names(CHECKED))
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True  # products of 16-bit values stay exact
    commands = {
        "check": run_check,
        "prepare": run_prepare,
        "recall": run_recall,
        "accuracy": run_accuracy,
    }
    commands[options.command](options)


if __name__ == "__main__":
    sys.exit(main())
