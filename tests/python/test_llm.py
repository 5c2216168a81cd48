"""The Python API with the packaged model: phase 1 once, phase 2 as often as one likes."""

import numpy as np
import pytest

from helpers import HERE, run_job
from star_attention import LLM, SamplingParams, StarConfig, UserError

TEXT = (
    "The harbour of Aldmere closes at nine. " * 12
    + "Its keeper is called Tomasz. "
    + "Ships from the north carry salt and timber. " * 12
)
QUESTION = "What is the name of the keeper of the harbour?"


@pytest.fixture(scope="module")
def llm(smollm2_folder):
    return LLM(smollm2_folder, StarConfig(block_size=128, tokens_per_block=32))


@pytest.fixture(scope="module")
def context(llm):
    return llm.encode(TEXT)


def test_asking_again_changes_nothing(llm, context):
    before = llm.runtime.pool.pages_in_use
    passes = llm.runtime.stats["context"].tokens
    first = llm.ask(context, QUESTION, SamplingParams(max_tokens=12))
    other = llm.ask(context, "What do ships carry?", SamplingParams(max_tokens=12))
    again = llm.ask(context, QUESTION, SamplingParams(max_tokens=12))
    assert first == again
    assert other.text != first.text
    assert "Tomasz" in first.text
    assert llm.runtime.pool.pages_in_use == before
    assert llm.runtime.stats["context"].tokens == passes


@pytest.mark.parametrize("placement", ["tail", "round_robin"])
def test_batch_equals_one_by_one(llm, placement):
    context = llm.encode(TEXT, StarConfig(block_size=128, kv_placement=placement))
    questions = [QUESTION, "When does it close?", "What do ships from the north carry?"]
    params = SamplingParams(max_tokens=10, temperature=0.8, top_p=0.95, seed=7)
    together = llm.ask(context, questions, params)
    assert together == [llm.ask(context, question, params) for question in questions]
    assert len({answer.text for answer in together}) == 3
    context.release()


def test_each_question_over_its_own_context(llm, context):
    texts = [TEXT.replace("Tomasz", name) for name in ("Agnes", "Peter")]
    contexts = [context, *map(llm.encode, texts)]
    params = SamplingParams(max_tokens=12)
    together = llm.ask(contexts, [QUESTION] * 3, params)
    assert together == [llm.ask(context, QUESTION, params) for context in contexts]
    assert ["Peter" in answer.text for answer in together] == [False, False, True]
    with pytest.raises(UserError, match="2 questions over 3 contexts: use one context, or one for"):
        llm.ask(contexts, [QUESTION] * 2)


def test_seed(llm, context):
    def answer(seed):
        params = SamplingParams(max_tokens=12, temperature=1.5, seed=seed)
        return llm.ask(context, QUESTION, params).token_ids

    assert answer(1) == answer(1)
    assert len({tuple(answer(seed)) for seed in range(4)}) > 1


def test_stream(llm, context):
    params = SamplingParams(max_tokens=12)
    pieces = list(llm.stream(context, QUESTION, params))
    assert "".join(piece.text for piece in pieces) == llm.ask(context, QUESTION, params).text
    assert len(pieces) > 3


def test_stop_string_and_end_token(llm, context):
    whole = llm.ask(context, QUESTION, SamplingParams(max_tokens=40))
    assert whole.finish_reason == "stop"
    cut = llm.ask(context, QUESTION, SamplingParams(max_tokens=40, stop=("keeper",)))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index("keeper")]
    short = llm.ask(context, QUESTION, SamplingParams(max_tokens=3))
    assert (short.finish_reason, len(short.token_ids)) == ("length", 3)


def test_one_block_is_dense(llm):
    dense = llm.encode(TEXT, StarConfig(attention="dense"))
    star = llm.encode(TEXT, StarConfig(block_size=1024))
    question = llm._tokenizer.question_tokens(QUESTION)
    question = np.array(question, np.int32)
    assert np.array_equal(llm.runtime.logits(dense, question), llm.runtime.logits(star, question))


def test_released_context(llm):
    context = llm.encode(TEXT)
    context.release()
    context.release()
    with pytest.raises(UserError, match="the context was released"):
        llm.ask(context, QUESTION)


def test_progress(llm):
    shares = []
    llm.encode(TEXT, on_progress=shares.append).release()
    assert shares == sorted(shares)
    assert len(shares) > 20


def test_length_limits(llm, context, smollm2_folder):
    with pytest.raises(UserError, match="context is empty"):
        llm.encode(" \n")
    with pytest.raises(UserError, match="question is empty"):
        llm.ask(context, ["What?", " "])
    with pytest.raises(UserError, match=r"a question has 90.. tokens, the model allows 8192"):
        llm.ask(context, "why " * 9000)
    with pytest.warns(UserWarning, match="the model was made for 8192"):
        llm.ask(context, QUESTION, SamplingParams(max_tokens=8000, stop=(" ",)))
    strict = LLM(smollm2_folder, StarConfig(tokens_per_block=32), strict=True)
    with pytest.raises(UserError, match=r"have 9... tokens, the model was made for 8192"):
        strict.encode("why " * 9000)


def test_ranks_give_the_same_answers(smollm2_folder):
    """Greedy and sampled, one question and several, whichever the ranks."""
    jobs = [run_job(ranks, HERE / "llm_job.py", smollm2_folder).stdout for ranks in (1, 2, 3)]
    assert "Tomasz" in jobs[0]
    assert jobs[1] == jobs[0]
    assert jobs[2] == jobs[0]
