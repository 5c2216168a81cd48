"""scripts/bench_latency.py over a tiny model on the CPU: rows of every method, and their plots."""

import argparse
import json
from dataclasses import asdict

import pytest

from helpers import load_script, save_tiny_model
from star_attention.distributed import SingleProcess
from star_attention.engines.options import EngineOptions
from star_attention.runtime.leader import lead_together


@pytest.fixture(scope="module")
def bench():
    return load_script("bench_latency")


def test_rows_and_plots(bench, tmp_path, monkeypatch, capsys):
    save_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    monkeypatch.setattr(bench, "EngineOptions", lambda *_, **__: EngineOptions("cpu", "float32"))
    names = {
        "model": str(tmp_path / "model"),
        "dtype": "float32",
        "kv_cache_gib": None,
        "kv_dtype": "auto",
    }
    options = argparse.Namespace(**names, merge="auto", tp=1, quantization="auto")
    engine = bench.make_engine(options, SingleProcess())
    leader, worker = lead_together(engine, SingleProcess())
    rows = []
    for method in bench.METHODS:
        for length in (512, 1024):
            config = bench.star_config(method, length, 256)
            row = bench.measure(leader, worker, method, length, config, 2, 1)
            rows += [{**row, "of_matmul": 0.5, "matmul_tflops": 1.0, "ranks": n} for n in (1, 2)]
    work = {row["method"]: row["busiest_gpu_pflop"] for row in rows if row["context"] == 1024}
    assert work["broadcast"] == work["local"] < work["recompute"]
    assert work["dense"] == work["ring"]

    rows[-1]["breakdown"] = dict.fromkeys(bench.PARTS, 0.1)
    environment = {"gpu": "none"}
    run = {"shape": "tiny", "dtype": "float32", "config": asdict(engine.config)}
    bench.save(tmp_path / "results.json", [{**run, "environment": environment, "rows": rows}])
    bench.compare(json.loads((tmp_path / "results.json").read_text()))
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split(" | ")[1:4] for line in lines] == [
        ["1", "512", "256"],
        ["1", "1,024", "256"],
        ["2", "512", "256"],
        ["2", "1,024", "256"],
    ]
    assert all(float(cell) > 0 for line in lines for cell in line.split(" | ")[4:8])
    bench.plot(tmp_path / "results.json", tmp_path / "plots")
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert drawn == {"first_token.png", "speed_up.png", "scaling.png", "phase1.png"}


def test_configurations(bench):
    """Blocks of a quarter and of a size once where they are the same; exact methods once."""
    methods = ["broadcast", "ring", "dense"]

    def measured(length):
        found = bench.configurations(methods, length, [None, 1 << 15], 1 << 17)
        return [(method, config.block_size) for config, method in found.items()]

    exact = [("ring", None), ("dense", None)]
    assert measured(1 << 16) == [("broadcast", 1 << 14), ("broadcast", 1 << 15), *exact]
    assert measured(1 << 17) == [("broadcast", 1 << 15), *exact]
    assert measured(1 << 18) == [("broadcast", 1 << 16), ("broadcast", 1 << 15)]
