"""Tokens of long texts are kept for the next question, as many as there is room for."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from helpers import train_tokenizer
from star_attention.errors import UserError
from star_attention.models.kept_tokens import KeptTokens
from star_attention.models.tokenizer import Message, Tokenizer

LONG = "It's 12345 o'clock! The quick brown fox.\n" * 200


class Counted:
    """Encodes a text as its characters, and counts."""

    def __init__(self, text):
        self.text, self.calls = text, 0

    def __call__(self):
        self.calls += 1
        return np.array([ord(each) for each in self.text], np.int32), [0]


def test_kept_until_others_need_the_room():
    kept = KeptTokens(most=10)
    texts = [Counted(character * 4) for character in "abc"]
    for each in (texts[0], texts[1], texts[0], texts[2], texts[0], texts[1]):
        tokens, _ = kept.get(each.text, [], each)
        assert tokens.tolist() == [ord(each.text[0])] * 4
    assert [each.calls for each in texts] == [1, 2, 1]


def test_a_text_larger_than_the_room():
    kept, large = KeptTokens(most=3), Counted("abcd")
    for _ in range(2):
        assert len(kept.get("abcd", [], large)[0]) == 4
    assert large.calls == 2


def test_places_count():
    kept, text = KeptTokens(), Counted("abc")
    for begins in ([], [1], [1, 2], [1]):
        kept.get("abc", begins, text)
    assert text.calls == 3


def test_threads_wait_for_the_first():
    kept, calls, all_ask = KeptTokens(), [], threading.Barrier(4)

    def encode():
        calls.append(1)
        return np.arange(5, dtype=np.int32), []

    def ask(_):
        all_ask.wait(10)
        return kept.get("text", [], encode)[0].tolist()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4))) == [[0, 1, 2, 3, 4]] * 4
    assert len(calls) == 1


def test_failures_are_not_kept():
    kept, text = KeptTokens(), Counted("abc")

    def fail():
        raise UserError("no")

    for _ in range(2):
        with pytest.raises(UserError):
            kept.get("abc", [], fail)
    assert len(kept.get("abc", [], text)[0]) == 3


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_conversations_have_the_same_tokens_again(tmp_path, kind):
    folder = train_tokenizer(tmp_path, kind)
    tokenizer = Tokenizer(folder)
    for parts in ((LONG, "Why?"), (LONG, "How?"), (LONG, LONG, "Why?"), (LONG + "Why?",)):
        chat = tokenizer.chat([Message("user", parts)])
        fresh = Tokenizer(folder).chat([Message("user", parts)])
        for each in (chat, tokenizer.chat([Message("user", parts)])):
            np.testing.assert_array_equal(each.token_ids, fresh.token_ids)
            assert each.starts == fresh.starts
    np.testing.assert_array_equal(tokenizer.text_tokens(LONG), tokenizer.text_tokens(LONG))
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.text_tokens(LONG + "\ud800")
