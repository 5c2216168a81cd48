"""The engine with contexts in 8 bits, on one and two ranks: answers near those over 16 bits, decode
steps as graphs, and what is kept on a disk."""

import json

import numpy as np
import pytest

from helpers import run_job, save_tiny_model, train_tokenizer

pytest.importorskip("star_attention.ops.cuda", exc_type=ImportError)

JOB = """
import json, sys
from star_attention import LLM, SamplingParams, StarConfig

model, kv_dtype, folder = sys.argv[1:]
division = {"block_size": 128, "anchor_size": 128, "tokens_per_block": 64, "kv_dtype": kv_dtype}
texts = ["The quick brown fox jumps over a lazy dog. " * 40, "Lorem ipsum dolor sit amet. " * 30]
params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=0)
found = {}
for name, more in {"star": {}, "selected": {"selected_pages": 2, "tokens_per_block": 128}}.items():
    config = StarConfig(**{**division, **more})
    where = folder + name
    options = {"device": "cuda", "dtype": "float16", "kv_cache_gib": 1, "context_dir": where}
    with LLM(model, config, **options) as llm:
        contexts = [llm.encode(text) for text in texts]
        answers = llm.ask([*contexts, contexts[0]], ["What?", "Who jumps?", "Why so?"], params)
        steps = llm.report()[0]["graph_steps"]
        llm.save(contexts[0], "first")
        pages = [each["pages_in_use"] for each in llm.report()]
        del contexts
    with LLM(model, config, **options) as llm:
        again = llm.ask(llm.load("first"), "What?", params)
    said = [[(t, p.token) for t, p in zip(a.token_ids, a.logprobs)] for a in [*answers, again]]
    found[name] = {"answers": said, "graph_steps": steps, "pages": pages}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 256, "vocab_size": 700, "max_position_embeddings": 4096}
    save_tiny_model(folder, initializer_range=0.05, **sizes)
    train_tokenizer(folder, "llama3")
    return folder


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_answers_are_near_those_of_16_bits(tmp_path, model, kv_dtype, processes):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    whole, ours = (
        json.loads(run_job(processes, script, model, kind, tmp_path / kind).stdout.splitlines()[-1])
        for kind in ("auto", kv_dtype)
    )
    for method, found in ours.items():
        assert found["graph_steps"] > 5
        first = [answer[0][1] for answer in found["answers"]]
        expected = [answer[0][1] for answer in whole[method]["answers"]]
        np.testing.assert_allclose(first, expected, atol=0.05)
        # What was loaded answers as what was read.
        loaded, read = found["answers"][3], found["answers"][0]
        assert loaded[0] == pytest.approx(read[0], abs=1e-3)
    assert sum(ours["star"]["pages"]) < 0.75 * sum(whole["star"]["pages"])
