"""The runtime's logits equal Hugging Face's under the block-sparse mask, float32."""

import numpy as np
import pytest

from helpers import MODELS, block_mask, hf_logits, run_oracle_job, save_tiny_model

PLACEMENTS = ["tail", "round_robin"]
MODES = ("recompute", "local", "broadcast")
# What differs from others in its weights only, or not at all, runs over fewer numbers of ranks.
FIRST = ("llama", "llama3-rope", "qwen2")
ALIKE = ("mistral", "ministral", "yarn", "qwen3-biases")
RANKS = {**dict.fromkeys(MODELS, (1, 3)), **dict.fromkeys(FIRST, (1, 2, 3, 4))}
RANKS |= dict.fromkeys(ALIKE, (2,))


def star_cases(page, block, anchors):
    return [
        {
            "block_size": block,
            "anchor_size": anchor,
            "anchor_mode": mode,
            "tokens_per_block": page,
            "kv_placement": PLACEMENTS,
        }
        for anchor in anchors
        for mode in (MODES if anchor else MODES[-1:])
    ]


def exact_case(method, page):
    return {"attention": method, "tokens_per_block": page, "kv_placement": PLACEMENTS}


def check(
    folder, num_ranks, model, hf_model, tokens, num_question, cases, tolerance, oracles=None, tp=1
):
    """Runs the cases and compares; `oracles` keeps Hugging Face's logits by (block, anchor)."""
    context_len = len(tokens) - 2 * num_question
    oracles = {} if oracles is None else oracles
    results = run_oracle_job(folder, num_ranks, model, tokens, num_question, cases, tp=tp)
    assert len(results) == len(cases) * len(PLACEMENTS)
    worst = 0.0
    for (index, placement), logits in results.items():
        case = cases[index]
        sizes = case.get("block_size", len(tokens)), case.get("anchor_size", 0)
        if sizes not in oracles:
            mask = block_mask(len(tokens), context_len, *sizes)
            oracles[sizes] = hf_logits(hf_model, tokens, mask)[context_len:]
        error = np.abs(logits - oracles[sizes]).max()
        assert error <= tolerance, f"{case} {placement}: max abs error {error}"
        worst = max(worst, error)
    print(f"{len(results)} cases over {num_ranks} ranks: max abs error {worst:.1e}")
    return oracles


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [(name, ranks) for name in MODELS for ranks in RANKS[name]],
)
def test_tiny_model(tmp_path, name, num_ranks):
    architecture, overrides = MODELS[name]
    hf_model = save_tiny_model(tmp_path / "model", architecture, **overrides)
    page, block, num_question = 8, 32, 11
    # The last block is one partial page; answers cross page borders.
    tokens = np.random.default_rng(1).integers(0, 97, 5 * block + 5 + 2 * num_question)
    cases = star_cases(page, block, [0, page, block // 4, block])
    cases.append(exact_case("ring", page))
    if num_ranks == 1:
        cases.append(exact_case("dense", page))
    oracles = check(
        tmp_path / "job",
        num_ranks,
        tmp_path / "model",
        hf_model,
        tokens.astype(np.int32),
        num_question,
        cases,
        1e-4,
    )
    # The masks matter: the oracles of different sizes are far apart.
    spread = [np.abs(a - b).max() for a in oracles.values() for b in oracles.values() if a is not b]
    assert min(spread) > 1e-2


@pytest.mark.parametrize(
    ("name", "processes"),
    [("llama", 2), ("qwen2", 4), ("biases", 2), ("qwen3", 4), ("qwen3-moe", 4), ("phi3-long", 2)],
)
def test_tensor_parallel(tmp_path, name, processes):
    """Two processes a rank."""
    architecture, overrides = MODELS[name]
    hf_model = save_tiny_model(tmp_path / "model", architecture, vocab_size=98, **overrides)
    page, num_question = 8, 9
    tokens = np.random.default_rng(4).integers(0, 98, 130 + 2 * num_question).astype(np.int32)
    cases = [*star_cases(page, 32, [0, 16]), exact_case("ring", page)]
    model = tmp_path / "model"
    check(tmp_path / "job", processes, model, hf_model, tokens, num_question, cases, 1e-4, tp=2)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_several_passes(tmp_path, num_ranks):
    """Blocks cut anywhere, also inside the anchor and inside pages, and few of them in a pass."""
    hf_model = save_tiny_model(tmp_path / "model")
    page, block, num_question = 8, 16, 3
    tokens = np.random.default_rng(5).integers(0, 97, 9 * block + 5 + 2 * num_question)
    methods = [*star_cases(page, block, [0, page, block]), exact_case("ring", page)]
    cases = [
        {**case, **limits}
        for case in methods
        for limits in (
            {"pass_tokens": block, "ring_tokens": block},
            {"pass_tokens": 2 * block + 5, "ring_tokens": 3 * block},
            {"pass_tokens": 3, "ring_tokens": 3},
            {"pass_sequences": 2},
        )
    ]
    model, job = tmp_path / "model", tmp_path / "job"
    check(job, num_ranks, model, hf_model, tokens.astype(np.int32), num_question, cases, 1e-4)


@pytest.mark.parametrize(("context_len", "num_ranks"), [(1, 2), (3, 4), (8, 3), (33, 4), (64, 3)])
def test_short_contexts(tmp_path, context_len, num_ranks):
    """More ranks than blocks, and blocks of one token."""
    hf_model = save_tiny_model(tmp_path / "model")
    page, num_question = 8, 3
    tokens = np.random.default_rng(2).integers(0, 97, context_len + 2 * num_question)
    cases = [*star_cases(page, 16, [0, 8, 16]), exact_case("ring", page)]
    check(
        tmp_path / "job",
        num_ranks,
        tmp_path / "model",
        hf_model,
        tokens.astype(np.int32),
        num_question,
        cases,
        1e-4,
    )


@pytest.fixture(scope="module")
def smollm2_oracles():
    return {}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_smollm2(tmp_path, num_ranks, smollm2, smollm2_folder, hf_smollm2, smollm2_oracles):
    page, block, num_question = 64, 512, 6
    tokens = np.random.default_rng(3).integers(0, 49152, 3 * block + 40 + 2 * num_question)
    cases = star_cases(page, block, [0, page, block // 4, block])
    cases.append(exact_case("ring", page))
    if num_ranks == 1:
        cases.append(exact_case("dense", page))
    check(
        tmp_path,
        num_ranks,
        smollm2 if num_ranks == 1 else smollm2_folder,
        hf_smollm2,
        tokens.astype(np.int32),
        num_question,
        cases,
        1e-3,
        smollm2_oracles,
    )
