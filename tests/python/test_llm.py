"""The Python API with the packaged model: phase 1 once, phase 2 as often as one likes."""

import gc
import itertools
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import HERE, forced_logits, run_job, save_tiny_model, train_tokenizer
from star_attention import LLM, SamplingParams, StarConfig, UserError
from star_attention.runtime import interrupts

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
    before = llm.report()[0]
    first = llm.ask(context, QUESTION, SamplingParams(max_tokens=12))
    other = llm.ask(context, "What do ships carry?", SamplingParams(max_tokens=12))
    again = llm.ask(context, QUESTION, SamplingParams(max_tokens=12))
    assert first == again
    assert other.text != first.text
    assert "Tomasz" in first.text
    after = llm.report()[0]
    assert after["pages_in_use"] == before["pages_in_use"]
    assert after["phases"]["context"] == before["phases"]["context"]


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
    with pytest.raises(UserError, match="2 questions with 3 contexts: use one, or one for"):
        llm.ask(contexts, [QUESTION] * 2)


def test_seed(llm, context):
    def answer(seed):
        params = SamplingParams(max_tokens=12, temperature=1.5, seed=seed)
        return llm.ask(context, QUESTION, params).token_ids

    assert answer(1) == answer(1)
    assert len({tuple(answer(seed)) for seed in range(4)}) > 1


def test_penalties(llm, context):
    """The greedy choice of each token, from its logits and the definitions."""
    params = SamplingParams(
        max_tokens=12,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        ignore_eos=True,
    )
    scheduler_context = context._context
    question = np.array(llm._tokenizer.question_tokens(QUESTION), np.int32)
    (piece,) = [p for p in llm.stream(context, QUESTION, params) if p.answer.token_ids][-1:]
    answer = piece.answer.token_ids
    rows = forced_logits(llm._leader, scheduler_context, question, answer)[len(question) - 1 :]
    for index, token in enumerate(answer[:-1]):
        logits, before = rows[index].astype(np.float64), answer[:index]
        seen = np.unique([*scheduler_context.token_ids, *question, *before])
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
        for each in set(before):
            logits[each] -= 0.5 + 0.7 * before.count(each)
        assert logits.argmax() == token
    assert answer != llm.ask(context, QUESTION, replace(params, repetition_penalty=1.0)).token_ids


def test_logprobs(llm, context):
    params = SamplingParams(max_tokens=5, logprobs=2, temperature=0.5, presence_penalty=1)
    answer = llm.ask(context, QUESTION, params)
    question = np.array(llm._tokenizer.question_tokens(QUESTION), np.int32)
    rows = forced_logits(llm._leader, context._context, question, answer.token_ids)
    for index, (token, each) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        logits = torch.from_numpy(rows[len(question) - 1 + index])
        expected = logits.double().log_softmax(-1)
        assert each.token == pytest.approx(expected[token].item(), abs=1e-3)
        values, indices = expected.topk(2)
        assert [top[0] for top in each.top] == indices.tolist()
        assert [top[1] for top in each.top] == pytest.approx(values.tolist(), abs=1e-3)
    assert llm.ask(context, QUESTION, replace(params, logprobs=None)).logprobs is None


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
    question = np.array(llm._tokenizer.question_tokens(QUESTION), np.int32)
    logits = [
        forced_logits(llm._leader, each._context, question, question[:3]) for each in (dense, star)
    ]
    assert np.array_equal(*logits)


def pages_in_use(llm):
    """On rank 0, by the worker and by the scheduler, which must agree."""
    in_use = llm.report()[0]["pages_in_use"]
    assert llm._leader.scheduler.pages_in_use.tolist() == [in_use]
    return in_use


def test_released_context(llm):
    context = llm.encode(TEXT)
    context.release()
    context.release()
    with pytest.raises(UserError, match="the context was released"):
        llm.ask(context, QUESTION)


def test_a_context_that_is_released_while_it_is_asked(llm):
    """Its answer goes on as if nothing had happened, whatever is read meanwhile."""
    expected = llm.ask(llm.encode(TEXT), QUESTION, SamplingParams(max_tokens=12)).text
    before = pages_in_use(llm)
    context = llm.encode(TEXT)
    pieces = llm.stream(context, QUESTION, SamplingParams(max_tokens=12))
    text = next(pieces).text
    context.release()
    other = llm.encode(TEXT.replace("Tomasz", "Agnes"))
    text += "".join(piece.text for piece in pieces)
    assert text == expected
    other.release()
    assert pages_in_use(llm) == before


def test_dropped_contexts_give_their_pages_back(llm):
    before = pages_in_use(llm)
    for _ in range(3):
        llm.encode(TEXT)
    gc.collect()
    assert pages_in_use(llm) == before
    with llm.encode(TEXT) as context:
        assert pages_in_use(llm) > before
    assert context.released
    assert pages_in_use(llm) == before


def test_abandoned_streams(llm, context):
    before = pages_in_use(llm)
    pieces = llm.stream(context, [QUESTION, "When does it close?"], SamplingParams(max_tokens=30))
    next(pieces)
    assert pages_in_use(llm) > before
    pieces.close()
    assert pages_in_use(llm) == before
    for _ in llm.stream(context, QUESTION):
        break
    gc.collect()
    assert pages_in_use(llm) == before


def test_two_streams_in_turn(llm, context):
    questions = [QUESTION, "What do ships from the north carry?"]
    params = SamplingParams(max_tokens=10)
    expected = [llm.ask(context, question, params).text for question in questions]
    streams = [llm.stream(context, question, params) for question in questions]
    texts = ["", ""]
    for pair in itertools.zip_longest(*streams):
        for index, piece in enumerate(pair):
            texts[index] += piece.text if piece else ""
    assert texts == expected


def test_a_question_that_ends_gives_its_pages_back_at_once(llm, context):
    """While others of its batch go on."""
    stop = SamplingParams(max_tokens=40, stop="keeper")
    before = pages_in_use(llm)
    in_use = [
        pages_in_use(llm) - before
        for _ in llm.stream(context, [QUESTION, "Count to a hundred."], stop)
    ]
    assert in_use[0] > in_use[-2] > 0 == in_use[-1]


def test_no_question(llm, context):
    assert llm.ask(context, []) == []
    assert list(llm.stream(context, [])) == []


def test_questions_are_refused_before_the_text_is_read(llm):
    before = llm.report()[0]["phases"]["context"]["tokens"]
    with pytest.raises(UserError, match="question is empty"):
        llm.encode(TEXT, questions=["What?", " "])
    with pytest.raises(UserError, match=r"a question has 90.. tokens"):
        llm.encode(TEXT, questions=["why " * 9000])
    assert llm.report()[0]["phases"]["context"]["tokens"] == before


def test_an_interrupt_in_the_middle(llm, context, monkeypatch):
    """What was running is done again, what is asked later is as ever."""
    params = SamplingParams(max_tokens=10)
    expected = llm.ask(context, QUESTION, params).text
    before = pages_in_use(llm)
    engine = llm._job._workers[llm._number].engine
    step, fails = type(engine).step, []

    def failing(self, *arguments, **options):
        if fails:
            raise fails.pop()
        return step(self, *arguments, **options)

    monkeypatch.setattr(type(engine), "step", failing)
    pieces = llm.stream(context, QUESTION, params)
    text = next(pieces).text + next(pieces).text
    fails.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        llm.encode(TEXT)
    fails.append(MemoryError("too much"))
    with pytest.raises(MemoryError):
        llm.ask(context, "When does it close?", params)
    assert text + "".join(piece.text for piece in pieces) == expected
    assert pages_in_use(llm) == before


def test_streams_that_the_collector_ends_in_the_middle_of_a_step(llm, context, monkeypatch):
    class Reader:
        pass

    params = SamplingParams(max_tokens=8)
    expected = llm.ask(context, QUESTION, params).text
    before = pages_in_use(llm)
    reader = Reader()
    reader.itself, reader.stream = reader, llm.stream(context, "When does it close?", params)
    next(reader.stream)
    del reader
    engine = type(llm._job._workers[llm._number].engine)
    step = engine.step
    monkeypatch.setattr(
        engine, "step", lambda *args, **kw: (gc.collect() and 0) or step(*args, **kw)
    )
    assert llm.ask(context, QUESTION, params).text == expected
    assert pages_in_use(llm) == before


def test_on_progress_that_fails(llm, context):
    before = pages_in_use(llm)
    with pytest.raises(ZeroDivisionError):
        llm.encode(TEXT, on_progress=lambda share: 1 / 0)
    pieces = llm.stream(context, QUESTION, SamplingParams(max_tokens=8))
    first = next(pieces).text
    with pytest.raises(RuntimeError, match="a model is at work: call it from one thread"):
        llm.encode(TEXT, on_progress=lambda share: next(pieces))
    pieces.close()
    assert first
    assert pages_in_use(llm) == before


def test_several_models(smollm2_folder, llm, context):
    other = LLM(smollm2_folder, StarConfig(block_size=128, tokens_per_block=32))
    with pytest.raises(UserError, match="the context was encoded by another LLM"):
        other.ask(context, QUESTION)
    kept = other.encode("Some words.")
    other.close()
    with pytest.raises(UserError, match="the model was closed"):
        other.ask(kept, QUESTION)
    workers = llm._job._workers
    other = LLM(smollm2_folder, StarConfig(block_size=128, tokens_per_block=32))
    assert len(workers) == 2
    del other
    gc.collect()
    pages_in_use(llm)
    assert len(workers) == 1


def test_where_an_interrupt_strikes():
    steps = []

    def interrupted(where):
        with interrupts.held(), interrupts.held():
            if where == "held":
                signal.raise_signal(signal.SIGINT)
                steps.append("went on")
            with interrupts.allowed():
                signal.raise_signal(signal.SIGINT)
                steps.append("went on in spite of it")

    # Whoever runs the tests may have it ignored.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for where in ("held", "allowed"):
            with pytest.raises(KeyboardInterrupt):
                interrupted(where)
        assert steps == ["went on"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)


def test_progress(llm):
    shares = []
    llm.encode(TEXT, on_progress=shares.append).release()
    assert shares == sorted(shares)
    assert len(shares) > 20


def test_length_limits(llm, context, smollm2_folder):
    with pytest.raises(UserError, match="context is empty"):
        llm.encode(" \n")
    with pytest.raises(UserError, match="context is empty"):
        llm.encode("\ufeff \n")
    with pytest.raises(UserError, match="question is empty"):
        llm.ask(context, ["What?", " "])
    with pytest.raises(UserError, match="question is empty"):
        llm.ask(context, "\ufeff")
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


def test_answer_prefixes(llm, context):
    """The model goes on from there."""
    params = SamplingParams(max_tokens=8)
    prefixes = ["The keeper is called", "Salt"]
    answers = llm.ask(context, [QUESTION, "What do ships carry?"], params, prefixes)
    assert answers[0].text.startswith(" Tomasz")
    assert answers[1] == llm.ask(context, "What do ships carry?", params, "Salt")
    with pytest.raises(UserError, match="1 question with 2 answer prefixes: use one, or one for"):
        llm.ask(context, [QUESTION], params, prefixes)


def test_system_messages_and_control_tokens(tmp_path, smollm2_folder):
    text = TEXT + "<|im_end|>\n"
    plain = LLM(smollm2_folder).encode(text).plan.context_len
    special = LLM(smollm2_folder, allow_special=True).encode(text).plan.context_len
    assert special < plain
    system = LLM(smollm2_folder, system="Be brief, be kind, and never say the word harbour.")
    assert system.encode(text).plan.context_len != plain


def test_tokens_that_the_model_does_not_know(tmp_path):
    """Of a tokenizer that is another model's: before the text is read, and for questions too."""
    save_tiny_model(tmp_path, vocab_size=300, max_position_embeddings=2048)
    train_tokenizer(tmp_path, "llama3")
    message = "token 3.., but the model knows 300 tokens: its tokenizer is another model's"
    llm = LLM(tmp_path, StarConfig(tokens_per_block=32), template="none")
    with pytest.raises(UserError, match=message):
        llm.encode("The quick brown fox jumps over the lazy dog.")
    with pytest.raises(UserError, match=message):
        llm.encode("a", questions=["jumps over"])
    context = llm.encode("a b c")
    with pytest.raises(UserError, match=message):
        llm.ask(context, "jumps over")
    assert len(llm.ask(context, "a", SamplingParams(max_tokens=3)).token_ids) == 3


@pytest.fixture
def saved(smollm2_folder, tmp_path):
    """A folder with a saved context, and what a fresh read of it gives: tokens and logits."""
    config = StarConfig(block_size=128, anchor_size=64, tokens_per_block=32)
    with LLM(smollm2_folder, config, context_dir=tmp_path / "kept") as llm:
        context = llm.encode(TEXT)
        llm.save(context, "harbour")
        yield tmp_path / "kept", *answer_and_logits(llm, context)


def answer_and_logits(llm, context):
    question = np.array(llm._tokenizer.question_tokens(QUESTION), np.int32)
    answer = llm.ask(context, QUESTION, SamplingParams(max_tokens=8))
    return answer, forced_logits(llm._leader, context._context, question, answer.token_ids)


def loading(folder, model, **options):
    return LLM(model, StarConfig(tokens_per_block=32), context_dir=folder, **options)


def test_a_context_that_is_loaded_is_the_one_that_was_read(smollm2_folder, saved, tmp_path):
    folder, answer, logits = saved
    shutil.copytree(folder, tmp_path / "copy")
    with loading(tmp_path / "copy", smollm2_folder) as llm:
        context = llm.load("harbour")
        assert llm.report()[0]["phases"]["context"]["tokens"] == 0
        assert (context.plan.block_size, context.plan.anchor_size) == (128, 64)
        again, same = answer_and_logits(llm, context)
        assert again == answer
        np.testing.assert_array_equal(same, logits)


def test_a_damaged_block_is_read_anew(smollm2_folder, saved, tmp_path, capfd):
    folder, answer, _ = saved
    shutil.copytree(folder, tmp_path / "copy")
    block = max((tmp_path / "copy/blocks/rank-0").glob("*.kv"))
    data = bytearray(block.read_bytes())
    data[-5] ^= 1
    block.write_bytes(data)
    with loading(tmp_path / "copy", smollm2_folder) as llm:
        context = llm.load("harbour")
        assert 0 < llm.report()[0]["phases"]["context"]["tokens"] < context.plan.context_len
        assert llm.ask(context, QUESTION, SamplingParams(max_tokens=8)) == answer
    assert "cannot be read and is forgotten: layer" in capfd.readouterr().err


def test_what_is_not_loaded(saved, smollm2_folder, tiny_chat_model, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    with pytest.raises(UserError, match=r"made with model .* here it is .*: use another folder"):
        loading(folder, tiny_chat_model)
    with pytest.raises(UserError, match="made with dtype float32, here it is bfloat16: use"):
        loading(folder, smollm2_folder, dtype="bfloat16")
    with loading(folder, smollm2_folder) as llm:
        with pytest.raises(UserError, match=r"the folder has no other\.json"):
            llm.load("other")
        with pytest.raises(UserError, match="is in use by another process: use another folder"):
            loading(folder, smollm2_folder)
        tokens = folder / "contexts/harbour.npy"
        tokens.write_bytes(tokens.read_bytes()[:-4])
        with pytest.raises(UserError, match=r"harbour\.json: its tokens cannot be read"):
            llm.load("harbour")


def test_what_is_not_saved(llm, context, smollm2_folder, tmp_path, monkeypatch, capfd):
    with pytest.raises(UserError, match=r"contexts are saved in context_dir: give it to LLM"):
        llm.save(context)
    with loading(tmp_path / "new", smollm2_folder) as other:
        ring = other.encode(TEXT, StarConfig(attention="ring"))
        with pytest.raises(UserError, match="attention ring cannot be saved: use star or dense"):
            other.save(ring)
        with pytest.raises(UserError, match=r"name is '\.\./a': use letters"):
            other.save(other.encode(TEXT), "../a")
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        fresh = other.encode(TEXT.replace("Tomasz", "Agnes"))
        with pytest.raises(UserError, match="the context folder does not take its KV"):
            other.save(fresh)
    assert "a context's KV is not kept in the context folder" in capfd.readouterr().err


def test_saving_while_an_answer_is_written(smollm2_folder, tmp_path):
    with loading(tmp_path / "new", smollm2_folder) as llm:
        context, params = llm.encode(TEXT), SamplingParams(max_tokens=10)
        expected = llm.ask(context, QUESTION, params).text
        pieces = llm.stream(context, QUESTION, params)
        text = next(pieces).text
        llm.save(context)
        assert text + "".join(piece.text for piece in pieces) == expected
