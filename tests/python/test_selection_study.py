"""scripts/study_selection.py's methods on random vectors, and the tables of its results."""

import json

import pytest
import torch

from helpers import load_script
from star_attention.ops import select_reference as select

names = "selection_methods", "selection_tables", "selection_cost"
methods, tables, costs = map(load_script, names)
TOKENS, LENGTH, PAGE = 1000, 1024, 32


def random_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1024, 4, 64, generator=generator)
    return q, torch.randn(1024 // PAGE, 2, 2, PAGE, 64, generator=generator)


def attend(name: str) -> tuple[torch.Tensor, float]:
    q, pool = random_inputs()
    method = methods.Method.parse(name)
    attention = methods.StudyAttention(method, 64**-0.5, TOKENS, LENGTH)
    return attention(q, pool)[:TOKENS], attention.pages()


SCORES = (
    "max,mass,all.local,all.local/heads=all,mean16.rows4,mean16.heads4.none,mean8.rough,mean16.sum,"
    "quest16,random,nearest,diagonal16,mean32.none.sum,mean16>all.local,mean16/margin=-1e9"
)


@pytest.mark.parametrize("score", SCORES.split(","))
def test_all_pages_are_dense_attention_and_none_is_star(score):
    dense, _ = attend("dense")
    found, _ = attend(f"{score}/pages=32/anchor=32")
    torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-5)
    star, _ = attend("star/anchor=32")
    found, pages = attend(f"{score}/pages=0/anchor=32")
    torch.testing.assert_close(found, star, atol=1e-5, rtol=1e-5)
    assert pages == 0


def test_pages_are_counted_over_tiles_that_may_choose():
    _, pages = attend("nearest/pages=1/anchor=32")
    assert pages == 1
    _, pages = attend("mean16/pages=2/margin=1e9/anchor=32")
    assert pages == 0


def test_first_layers_are_dense_and_choices_last_for_some():
    q, pool = random_inputs()
    other = pool.flip(0).contiguous()
    method = methods.Method.parse("mean16/pages=2/anchor=32/every=2/dense=1")
    attention = methods.StudyAttention(method, 64**-0.5, TOKENS, LENGTH)
    outputs = [attention(q.clone(), each)[:TOKENS] for each in (pool, pool, other, other)]
    assert torch.equal(outputs[0], attend("dense")[0])
    fresh, _ = attend("mean16/pages=2/anchor=32")
    assert torch.equal(outputs[1], fresh)
    assert torch.equal(outputs[2], outputs[3])


def test_bounds_are_above_and_exact_for_single_keys():
    q, pool = random_inputs()
    keys = select.page_keys(methods.KvHeads(pool).keys, PAGE)
    rows = q.unflatten(1, (2, -1)).transpose(0, 1).flatten(1, 2)
    exact = select.multiply(rows, keys)
    split = methods.bound_rows(rows)
    torch.testing.assert_close(select.multiply(split, methods.bounds(keys, 1)), exact)
    above = select.multiply(split, methods.bounds(keys, 16))
    assert (above >= exact.unflatten(3, (-1, 16)).amax(-1) - 1e-4).all()


@pytest.mark.parametrize("name", ["mean16.what", "median16"])
def test_an_unknown_score_is_refused(name):
    with pytest.raises(ValueError, match=name):
        attend(name)


def test_tables_compare_the_same_samples(tmp_path, capsys):
    scores = {"dense": [1, 1, 0, 0.5], "mean16": [1, 0.5, 0.5], "star": [0, 0]}
    lines = [
        {"task": "vt", "length": 16384, "method": method, "index": index, "score": score}
        for method, all_scores in scores.items()
        for index, score in enumerate(all_scores)
    ]
    raw, out = tmp_path / "vt.jsonl", tmp_path / "selection.json"
    raw.write_text("\n".join(json.dumps(line) for line in reversed(lines)))
    recall = tmp_path / "recall.json"
    sums = {"vt": {"max": [[[1, 2], [0, 0]], [[2, 2], [0, 0]]]}}  # [layers, metrics, 2]
    recall.write_text(json.dumps({"metrics": ["top", "link"], "sums": sums}))
    about = ["--environment", "one GPU", "--model", "a model"]
    tables.main(["collect", str(out), str(raw), str(recall), *about])
    assert json.loads(out.read_text())["accuracy"][0]["scores"] == scores["star"]
    tables.main(["show", str(out)])
    shown = capsys.readouterr().out
    assert "| mean16 | 3 | 66.7 | +0.0 ± 28.9 | 1 / 1 |" in shown
    assert "| star | 2 | 0.0 | -100.0 ± 0.0 | 0 / 2 |" in shown
    assert shown.endswith("| score | vt: top |\n|---|---|\n| max | 0.750 |\n")


def test_costs_count_the_pairs_that_may_be_chosen(capsys, monkeypatch):
    division = select.Division(1 << 15, 1 << 13, costs.ANCHOR)
    candidates = division.candidates("cpu")
    pairs = division.tile * division.page
    assert costs.candidate_pairs(1 << 15, 1 << 13) == candidates.sum() * pairs
    chosen = candidates.sum(-1).clamp(max=costs.PAGES).sum()
    assert costs.chosen_pairs(1 << 15, 1 << 13) == chosen * pairs
    monkeypatch.setattr("sys.argv", ["selection_cost.py"])
    costs.main()
    assert "| mean16 | 1/16 | 0.13 | 0.2 | 5.8 % |" in capsys.readouterr().out
