import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import train_tokenizer
from star_attention.models.tokenizer import TextStream, Tokenizer, _load


@pytest.fixture(scope="module", params=["smollm2", "llama3", "llama2"])
def tokenizer(request, tmp_path_factory, smollm2):
    if request.param == "smollm2":
        return Tokenizer(smollm2)
    return Tokenizer(train_tokenizer(tmp_path_factory.mktemp(request.param), request.param))


TEXT = st.text(
    st.sampled_from("ab Z9.,!?'\n\t\r-_()\u00e9\u4f60\U0001f600"), min_size=1, max_size=40
).filter(str.strip)


@given(context=TEXT, question=TEXT)
def test_parts_are_the_template_of_the_whole(tokenizer, context, question):
    whole = tokenizer.apply_template(tokenizer.user_turn(context, question))
    tokens = tokenizer._tokenizer(whole, add_special_tokens=False).input_ids
    parts = tokenizer.context_tokens(context), tokenizer.question_tokens(question)
    assert parts[0] + parts[1] == tokens


def test_template_none(smollm2):
    tokenizer = Tokenizer(smollm2, "none")
    assert not tokenizer.uses_chat
    assert tokenizer.decode(tokenizer.context_tokens(" a b\n")) == " a b\n"
    assert tokenizer.decode(tokenizer.question_tokens(" c?")) == " c?"


def test_gguf_tokenizers_are_kept(tmp_path, monkeypatch, smollm2):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read, kept = (_load.__wrapped__(smollm2) for _ in range(2))
    (folder,) = (tmp_path / "star_attention" / "tokenizers").iterdir()
    assert (read.name_or_path, kept.name_or_path) == (str(smollm2.parent), str(folder))
    assert kept.get_vocab() == read.get_vocab()
    assert kept.special_tokens_map == read.special_tokens_map
    turn = [{"role": "user", "content": "Hi, 2\u00a0you \U0001f600!"}]
    assert kept.apply_chat_template(turn) == read.apply_chat_template(turn)

    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert _load.__wrapped__(smollm2).get_vocab() == read.get_vocab()


def stream(tokenizer, text, stop=()):
    pieces = []
    stream = TextStream(tokenizer, stop)
    for token in tokenizer.question_tokens(text):
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


@given(text=TEXT)
def test_stream_gives_the_text(smollm2_plain, text):
    assert "".join(stream(smollm2_plain, text)) == text


@pytest.fixture(scope="module")
def smollm2_plain(smollm2):
    return Tokenizer(smollm2, "none")


def test_stream_holds_back_incomplete_characters(smollm2_plain):
    pieces = stream(smollm2_plain, "\U0001f600\U0001f680")
    assert "".join(pieces) == "\U0001f600\U0001f680"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_stop_strings(smollm2_plain):
    pieces = stream(smollm2_plain, "one two three four", ["two thr", "never"])
    assert "".join(pieces) == "one "
    assert "".join(stream(smollm2_plain, "one two thick", ["two thr"])) == "one two thick"


@given(
    text=st.text(st.sampled_from("aab \U0001f600"), min_size=1, max_size=30).filter(str.strip),
    stop=st.lists(st.text(st.sampled_from("aab "), min_size=1, max_size=6), max_size=5),
)
def test_stop_strings_across_tokens(smollm2_plain, text, stop):
    ends = [text.find(string) for string in stop if string in text]
    first = min((text.find(string) + len(string) for string in stop if string in text), default=0)
    *pieces, rest = stream(smollm2_plain, text, stop)
    shown = "".join(pieces) + rest
    assert text.startswith(shown)
    if ends:
        assert len(shown) in ends
        assert len(shown) < first
    else:
        assert shown == text
