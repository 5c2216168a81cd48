import json
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import CORPUS, LLAMA3_SPLIT, train_tokenizer
from star_attention.errors import UserError
from star_attention.models import plain_text
from star_attention.models.plain_text import PlainText
from star_attention.models.tokenizer import Message, TextStream, Tokenizer, _load

LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{{ bos_token + content if loop.index0 == 0 else content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate\nuser/assistant/user/assistant/...') }}{% endif %}"
    "{% set content = (system if loop.first else '') + message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def variant(folder, kind, template, **tokens):
    """A trained tokenizer with other tokens and another chat template."""
    wrapped = _load(train_tokenizer(folder / "trained", kind))
    wrapped.add_tokens(tokens.get("added", []))
    wrapped.add_tokens(tokens.get("special", []), special_tokens=True)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module", params=["smollm2", "llama3", "llama3 headers", "llama2", "[INST]"])
def tokenizer(request, tmp_path_factory, smollm2):
    if request.param == "smollm2":
        return Tokenizer(smollm2)
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "llama3 headers":
        special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        return variant(folder, "llama3", LLAMA3_TEMPLATE, special=special)
    if request.param == "[INST]":
        return variant(folder, "llama2", LLAMA2_TEMPLATE)
    return Tokenizer(train_tokenizer(folder, request.param))


TEXT = st.text(
    st.sampled_from("ab Z9.,!?'\n\t\r-_()\u00e9\u4f60\U0001f600"), min_size=1, max_size=40
).filter(str.strip)


def content(message):
    return "\n".join(part.strip() for part in message.parts if part.strip())


def template_text(tokenizer, messages):
    turns = [{"role": message.role, "content": content(message)} for message in messages]
    return tokenizer._tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )


def template_tokens(tokenizer, messages):
    text = template_text(tokenizer, messages)
    return tokenizer._tokenizer(text, add_special_tokens=False).input_ids


def text_of(tokenizer, tokens):
    return b"".join(map(tokenizer.token_bytes, tokens)).decode()


def user(*parts):
    return Message("user", parts)


@given(context=TEXT, question=TEXT)
def test_parts_are_the_template_of_the_whole(tokenizer, context, question):
    turn = [user(context, question)]
    parts = tokenizer.context_tokens(context), tokenizer.question_tokens(question)
    assert parts[0] + parts[1] == template_tokens(tokenizer, turn)
    chat = tokenizer.chat(turn)
    assert chat.token_ids.tolist() == parts[0] + parts[1]
    assert chat.starts[0][1] == len(parts[0])


PARTS = st.lists(TEXT, min_size=1, max_size=3).map(tuple)


@st.composite
def conversations(draw):
    parts = draw(st.lists(PARTS, min_size=1, max_size=5).filter(lambda parts: len(parts) % 2))
    turns = [Message(("user", "assistant")[n % 2], parts[n]) for n in range(len(parts))]
    return [*draw(st.lists(PARTS.map(lambda p: Message("system", p)), max_size=1)), *turns]


@given(messages=conversations())
def test_chat_is_the_template_of_the_whole(tokenizer, messages):
    chat = tokenizer.chat(messages)
    assert chat.token_ids.tolist() == template_tokens(tokenizer, messages)
    for message, starts in zip(messages, chat.starts, strict=True):
        for part, start in zip(message.parts, starts, strict=True):
            assert text_of(tokenizer, chat.token_ids[start:]).lstrip().startswith(part.strip())


@given(messages=conversations(), answer=PARTS, question=PARTS)
def test_longer_conversations_begin_alike(tokenizer, messages, answer, question):
    chat = tokenizer.chat(messages)
    longer = tokenizer.chat([*messages, Message("assistant", answer), user(*question)])
    assert longer.starts[: len(messages)] == chat.starts
    last = chat.starts[-1][-1]
    np.testing.assert_array_equal(longer.token_ids[:last], chat.token_ids[:last])


def test_empty_parts_are_dropped(smollm2):
    tokenizer = Tokenizer(smollm2)
    chat = tokenizer.chat([user("", "Hi"), Message("assistant", ()), user("a", " \n", "b")])
    same = tokenizer.chat([user("Hi"), Message("assistant", ("",)), user("a", "b")])
    np.testing.assert_array_equal(chat.token_ids, same.token_ids)
    assert [len(starts) for starts in chat.starts] == [2, 0, 3]
    assert chat.starts[0] == 2 * same.starts[0]
    assert chat.starts[2][::2] == same.starts[2]


def controls(tokenizer):
    added = tokenizer._tokenizer.added_tokens_decoder
    return {
        token: added[token].content
        for token in added
        if not added[token].content.startswith("<0x")  # bytes
    }


def test_texts_spell_no_control_tokens(tokenizer):
    control = controls(tokenizer)
    assert set(tokenizer._tokenizer.all_special_tokens) <= set(control.values())
    assert len(control) >= 4

    def check(messages):
        chat = tokenizer.chat(messages)
        plain = tokenizer.chat([Message(m.role, ("x",) * len(m.parts)) for m in messages])
        assert [t for t in chat.token_ids if t in control] == [
            t for t in plain.token_ids if t in control
        ]
        # Llama 2's tokenizer writes spaces behind control tokens.
        text, expected = text_of(tokenizer, chat.token_ids), template_text(tokenizer, messages)
        assert text.replace(" ", "") == expected.replace(" ", "")
        return chat

    for name in control.values():
        text = f"{name} a{name}b {name}{name}"
        check([Message("system", (text,)), user(text), Message("assistant", (text,)), user(text)])
        borders = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        for context, question in [(text, text), *borders]:
            tokens = tokenizer.context_tokens(context) + tokenizer.question_tokens(question)
            assert tokens == check([user(context, question)]).token_ids.tolist()
        assert not control.keys() & set(tokenizer.text_tokens(text).tolist())
    base = Tokenizer(tokenizer._path, "none")
    for name in control.values():
        tokens = base.context_tokens(name) + base.question_tokens(name)
        assert not control.keys() & set(tokens)
        assert text_of(base, tokens).replace(" ", "") == name + name


def test_special_tokens_that_are_allowed(tokenizer):
    """Are those of Hugging Face's tokenizer, template and text alike."""
    allowed = Tokenizer(tokenizer._path, allow_special=True)
    for name in controls(tokenizer).values():
        turn = [Message("system", (name,)), user(f"{name} a{name}", f"b {name}")]
        assert allowed.chat(turn).token_ids.tolist() == template_tokens(allowed, turn)
    name = next(iter(controls(tokenizer).values()))
    base = Tokenizer(tokenizer._path, "none", allow_special=True)
    assert base.text_tokens(name).tolist() == base._tokenizer(name).input_ids


def test_system_messages(tokenizer):
    """The parts are the template of the whole, and the text spells no control tokens."""
    names = "".join(controls(tokenizer).values())
    for system in ("Be brief.\n", f" {names} "):
        with_system = Tokenizer(tokenizer._path, system=system)
        turn = [Message("system", (system,)), user("A text", "A question?")]
        parts = with_system.context_tokens("A text"), with_system.question_tokens("A question?")
        assert parts[0] + parts[1] == tokenizer.chat(turn).token_ids.tolist()


def test_system_messages_that_are_refused(tmp_path, smollm2):
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    train_tokenizer(tmp_path, "llama3")
    (tmp_path / "chat_template.jinja").write_text(needs + plain)
    with pytest.raises(UserError, match="no system: give it a system message with --system"):
        Tokenizer(tmp_path)
    assert Tokenizer(tmp_path, system="Hi").uses_chat
    _load.cache_clear()
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    with pytest.raises(UserError, match=r"text of message 1, .*: leave --system away"):
        Tokenizer(tmp_path, system="Hi")
    with pytest.raises(UserError, match="--system needs a chat template"):
        Tokenizer(smollm2, "none", system="Hi")
    with pytest.raises(UserError, match="--system is empty"):
        Tokenizer(smollm2, system=" ")


BAD_TEMPLATES = {
    "{{ raise_exception('never') }}": "does not allow these messages: never: use --template none",
    "{% for m in messages %}": "does not allow these messages: .*use --template none",
    "{{ unknown.field.other }}": "does not allow these messages: .*use --template none",
    "{{ 1 / 0 }}": "does not allow these messages: division by zero",
    "{% for a in range(10000000000) %}{% endfor %}": "does not allow these messages: Range too big",
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_templates_that_fail(tmp_path, template):
    train_tokenizer(tmp_path, "llama3")
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=BAD_TEMPLATES[template]) as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    tokens = Tokenizer(tmp_path, "none").context_tokens("The dog")
    assert Tokenizer(tmp_path, "none").decode(tokens) == "The dog"


def test_templates_with_dates_tools_and_variants(tmp_path):
    """Llama 3.1's and 3.2's have such parts: what is not given is left out."""
    dated = "{{ strftime_now('%Y') }} {{ date_string or '26 Jul 2024' }} "
    tools = "{% if tools is not none and tools %}{{ tools | tojson }}{% endif %}"
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    train_tokenizer(tmp_path, "llama3")
    (tmp_path / "chat_template.jinja").write_text(dated + tools + plain)
    tokenizer = Tokenizer(tmp_path)
    text = tokenizer.decode(tokenizer.context_tokens("The dog"))
    assert re.fullmatch(r"20\d\d 26 Jul 2024 The dog\n", text)
    _load.cache_clear()
    path = tmp_path / "tokenizer_config.json"
    (tmp_path / "chat_template.jinja").unlink()
    several = [
        {"name": "tool_use", "template": "{{ 1 / 0 }}"},
        {"name": "default", "template": plain},
    ]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": several}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.context_tokens("The dog")) == "The dog\n"


def test_added_tokens_of_the_template_are_control_tokens(tmp_path):
    template = "{% for message in messages %}<|{{ message['role'] }}|><think>" + (
        "{{ message['content'] }}{% endfor %}"
    )
    added = ["<think>", "<|system|>", "<table>", "  "]
    tokenizer = variant(tmp_path, "llama3", template, added=added)
    think, system, table, spaces = tokenizer._tokenizer.convert_tokens_to_ids(added)
    tokens = tokenizer.context_tokens("a <think> b  <|system|> <table>")
    assert tokens.count(think) == 1  # the template's
    assert tokens.count(system) == 0
    assert tokens.count(table) == tokens.count(spaces) == 1


def test_models_that_spell_control_tokens_themselves():
    from tokenizers import Tokenizer as Fast
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "<s>s", "<", "s", ">", "s>", "<s"]
    merges = [("s", ">"), ("<", "s>"), ("<s>", "s"), ("<", "s")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    for model in (
        models.BPE(vocab, merges, unk_token="<unk>"),
        models.BPE(vocab, merges, ignore_merges=True),
        models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0),
    ):
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=Fast(model), bos_token="<s>", unk_token="<unk>"
        )
        plain = PlainText(wrapped)
        assert wrapped("<s>").input_ids == [1]
        assert 1 not in plain.encode("<s>s<s>").ids
        assert plain.encode(plain.control("<s>") + "<s>").ids.count(1) == 1


REFUSED = {
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}": (
        "leaves out, repeats or moves the text of message 1, of the role system"
    ),
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[1].content }}": (
        "leaves out, repeats or moves the text of message 2, of the role user"
    ),
    "{% for m in messages | reverse %}{{ m.content }}{% endfor %}": (
        "leaves out, repeats or moves the text of message 1, of the role system"
    ),
    LLAMA2_TEMPLATE: "not allow these messages: Roles must alternate user/assistant/user/",
}


@pytest.mark.parametrize("template", REFUSED, ids=range(len(REFUSED)))
def test_templates_refuse_messages(tmp_path, template):
    user_only = "{% if messages | length == 1 %}{{ messages[0].content }}{% else %}"
    tokenizer = variant(tmp_path, "llama3", user_only + template + "{% endif %}")
    messages = [Message("system", ("a",)), user("b"), user("c")]
    with pytest.raises(UserError, match=REFUSED[template]) as error:
        tokenizer.chat(messages)
    assert "\n" not in str(error.value)


def test_conversations_that_are_none(smollm2):
    tokenizer = Tokenizer(smollm2)
    for messages, reason in (
        ([], "the conversation is empty"),
        ([Message("wizard", ("a",))], "role of message 1 is 'wizard': use one of system, user, a"),
        ([user("a", " ")], "the last message of the user is empty"),
        ([user("a"), Message("assistant", ("b",)), user()], "the last message of the user is emp"),
        ([user("\ud800")], "half of a surrogate pair"),
    ):
        with pytest.raises(UserError, match=reason):
            tokenizer.chat(messages)
    with pytest.raises(UserError, match="no chat template: use /v1/completions"):
        Tokenizer(smollm2, "none").chat([user("a")])


def test_text_tokens(tmp_path, smollm2):
    from tokenizers.processors import TemplateProcessing

    smollm2 = Tokenizer(smollm2)
    assert smollm2.decode(smollm2.text_tokens(" a\n")) == " a\n"
    opened = _load(train_tokenizer(tmp_path / "trained", "llama3"))
    special = [("<s>", opened.bos_token_id)]
    opened.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=special
    )
    opened.save_pretrained(tmp_path)
    chat, base = Tokenizer(tmp_path), Tokenizer(tmp_path, "none")
    tokens = chat.text_tokens(" <s>")
    assert tokens[0] == opened.bos_token_id
    assert chat.decode(tokens[1:]) == " <s>"
    assert base.context_tokens(" <s>") == tokens.tolist()


def test_texts_of_tokens(tokenizer):
    text = "Hi  there,\n\u00e9\u4f60\U0001f600"
    tokens = tokenizer.text_tokens(text)
    assert text_of(tokenizer, tokens).lstrip() == text
    for token, name in controls(tokenizer).items():
        assert tokenizer.token_text(token) == name
        assert tokenizer.token_bytes(token) == name.encode()
    unknown = tokenizer.vocab_size
    assert (tokenizer.token_text(unknown), tokenizer.token_bytes(unknown)) == ("", b"")
    assert tokenizer._tokenizer.convert_ids_to_tokens(unknown - 1)

    parts = [tokenizer.token_bytes(token) for token in tokenizer.question_tokens("\U0001f680")]
    texts = [tokenizer.token_text(token) for token in tokenizer.question_tokens("\U0001f680")]
    incomplete = [index for index, part in enumerate(parts) if part[:1] >= b"\x80"]
    assert b"".join(parts[index] for index in incomplete) == "\U0001f680".encode()
    assert all("\N{REPLACEMENT CHARACTER}" in texts[index] for index in incomplete)


def test_template_none(smollm2):
    tokenizer = Tokenizer(smollm2, "none")
    assert not tokenizer.uses_chat
    assert tokenizer.decode(tokenizer.context_tokens(" a b\n")) == " a b\n"
    assert tokenizer.decode(tokenizer.question_tokens(" c?")) == " c?"


def test_gguf_tokenizers_are_kept(tmp_path, monkeypatch, smollm2):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read, kept = (_load.__wrapped__(smollm2) for _ in range(2))
    (folder,) = (tmp_path / "star_attention" / "tokenizers").iterdir()
    assert kept.name_or_path == str(folder) != read.name_or_path
    assert kept.get_vocab() == read.get_vocab()
    assert kept.special_tokens_map == read.special_tokens_map
    turn = [{"role": "user", "content": "Hi, 2\u00a0you \U0001f600!"}]
    assert kept.apply_chat_template(turn) == read.apply_chat_template(turn)

    (folder / "tokenizer.json").write_text("{")  # as a full disk leaves it
    assert _load.__wrapped__(smollm2).get_vocab() == read.get_vocab()

    def fail(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as the library says it

    monkeypatch.setattr(type(read), "save_pretrained", fail)
    for cache in ("/proc/nowhere", str(tmp_path / "full")):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert _load.__wrapped__(smollm2).get_vocab() == read.get_vocab()


@pytest.mark.parametrize("template", ["auto", "none"])
def test_a_byte_order_mark_is_no_text(smollm2, template):
    tokenizer, mark = Tokenizer(smollm2, template), "\ufeff"
    for text in ("A text.", " \n A text.\n"):
        assert tokenizer.context_tokens(mark + text) == tokenizer.context_tokens(text)
        assert tokenizer.question_tokens(mark + text) == tokenizer.question_tokens(text)
        assert tokenizer.least_tokens(mark + text) == tokenizer.least_tokens(text)
        plain = tokenizer.text_tokens(text)
        np.testing.assert_array_equal(tokenizer.text_tokens(mark + text), plain)
        within = tokenizer.text_tokens(text + mark)
        assert len(within) > len(plain)
    if template == "auto":
        both = [
            tokenizer.chat([Message("user", (before + "A text.", before + "Why?"))])
            for before in ("", mark)
        ]
        np.testing.assert_array_equal(both[0].token_ids, both[1].token_ids)
        assert both[0].starts == both[1].starts
        with pytest.raises(UserError, match="the last message of the user is empty"):
            tokenizer.chat([Message("user", (mark,))])


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


@given(tokens=st.lists(st.integers(0, 620), max_size=60))
def test_stream_gives_what_any_tokens_spell(llama2_plain, tokens):
    """Also bytes that are no character, control tokens, and tokens that there are not."""
    stream = TextStream(llama2_plain)
    text = "".join(map(stream.add, tokens)) + stream.finish()
    unfinished = "\N{REPLACEMENT CHARACTER}"
    assert text.rstrip(unfinished) == llama2_plain.decode(tokens).rstrip(unfinished)


@pytest.fixture(scope="module")
def llama2_plain(tmp_path_factory):
    return Tokenizer(train_tokenizer(tmp_path_factory.mktemp("llama2"), "llama2"), "none")


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


@pytest.fixture(scope="module", params=["plain", "NFC", "no bytes", "added"])
def counted(request, tmp_path_factory):
    """Byte-level tokenizers that normalise texts, drop bytes, or know words with spaces."""
    from tokenizers import AddedToken, normalizers

    folder = train_tokenizer(tmp_path_factory.mktemp("counted"), "llama3")
    tokenizer = _load(folder)
    if request.param == "NFC":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    if request.param == "no bytes":
        state = json.loads((folder / "tokenizer.json").read_text())
        lost = [each for each, byte in plain_text._BYTE_OF.items() if byte in (0x01, 0xE3)]
        assert not any(each in merge for each in lost for merge in state["model"]["merges"])
        for each in lost:
            del state["model"]["vocab"][each]
        (folder / "tokenizer.json").write_text(json.dumps(state))
        return PlainText(_load.__wrapped__(folder))
    if request.param == "added":
        tokenizer.add_tokens([AddedToken("x" * 50), AddedToken("\u00e9 \u4f60" * 20)])
    return PlainText(tokenizer)


MANY = st.one_of(
    TEXT,
    st.text(),
    st.text("e\u0301\u03b1\u0314\u0300\u0345\u1100\u1161\u11a8\u212a\u1fef\u3042\x01", max_size=40),
    st.sampled_from([" ", "x", "\u00e9 \u4f60", "\x01", "\u3042"]).map(lambda text: text * 200),
)


@given(text=MANY)
@settings(max_examples=50)
def test_a_text_has_no_fewer_tokens(counted, text):
    assert counted._longest is not None
    assert counted.least_tokens(text) <= len(counted.encode(text))


@given(text=MANY)
@settings(max_examples=50)
def test_a_text_has_no_fewer_tokens_of_any_family(tokenizer, text):
    assert tokenizer.least_tokens(text) <= len(tokenizer.text_tokens(text))


def test_the_fewest_tokens_are_not_far_off(smollm2, counted):
    assert Tokenizer(smollm2).least_tokens("x" * 10**6) > 10**4
    assert counted.least_tokens("x" * 10**6) > 1000


def test_unicode_composes_four_characters_at_most():
    decomposed = [len(unicodedata.normalize("NFD", chr(code))) for code in range(0x110000)]
    assert max(decomposed) == plain_text._COMPOSED


def test_tokenizers_that_may_drop_characters(tmp_path):
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    for name, change in {
        "strip": lambda each: setattr(each, "normalizer", normalizers.Strip()),
        "regex": lambda each: setattr(each, "pre_tokenizer", pre_tokenizers.Whitespace()),
        "added": lambda each: each.add_tokens([AddedToken("<mask>", lstrip=True)]),
    }.items():
        tokenizer = _load(train_tokenizer(tmp_path / name, "llama3"))
        change(tokenizer.backend_tokenizer)
        assert PlainText(tokenizer).least_tokens("x" * 10**6) == 0


def test_a_huge_text_has_the_same_tokens(tokenizer, monkeypatch):
    text = "It's 12345 o'clock! The quick \u4f60 \U0001f600 <|end|>\n" * 30
    chat = tokenizer.chat([user(text, text, "Why?")])
    tokens = tokenizer.text_tokens(text)
    monkeypatch.setattr(plain_text, "_HUGE", 1000)
    monkeypatch.setattr(tokenizer, "_kept", None)
    monkeypatch.setattr("star_attention.models.tokenizer._LONG", 1 << 30)
    again = tokenizer.chat([user(text, text, "Why?")])
    np.testing.assert_array_equal(again.token_ids, chat.token_ids)
    assert again.starts == chat.starts
    np.testing.assert_array_equal(tokenizer.text_tokens(text), tokens)
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.text_tokens(text + "\ud800")
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(UserError, match="ended with code 1"):
        tokenizer.text_tokens(text)


def write_gguf_tokenizer(path, folder, pre, is_sentencepiece=False, **flags):
    """The tokenizer of a folder as llama.cpp's converter writes it."""
    import gguf

    state = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in state["added_tokens"]}
    pieces = {**state["model"]["vocab"], **{t["content"]: t["id"] for t in state["added_tokens"]}}
    writer = gguf.GGUFWriter(path, "llama")
    names = sorted(pieces, key=pieces.get)
    if pre:
        writer.add_tokenizer_pre(pre)
    if is_sentencepiece:
        merged = ["".join(merge) for merge in state["model"]["merges"]]
        rank = {piece: index for index, piece in enumerate(merged)}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(rank.get(name, 1e6)) for name in names])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_token_list(names)
    kinds = {name: 6 for name in names if name.startswith("<0x")} | {"<unk>": 2}
    normal = [3 if pieces[name] in special else 1 for name in names]
    writer.add_token_types([kinds.get(n, kind) for n, kind in zip(names, normal, strict=True)])
    writer.add_bos_token_id(pieces["<s>"])
    writer.add_eos_token_id(pieces["<|end|>"])
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
CUTS = {
    "llama-bpe": {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated"},
    "qwen2": {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated"},
    "smollm": {"type": "Digits", "individual_digits": True},
    "gpt-2": None,
}


@pytest.mark.parametrize("pre", CUTS)
def test_gguf_tokenizers_cut_texts_as_hugging_face_does(tmp_path, monkeypatch, pre):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = train_tokenizer(tmp_path / "hf", "llama3")
    state = json.loads((folder / "tokenizer.json").read_text())
    is_split = pre in ("llama-bpe", "qwen2")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cut = [{**CUTS[pre], "invert": False} if is_split else CUTS[pre]] if CUTS[pre] else []
    cut += [{**level, "use_regex": not is_split}]
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": cut}
    state["normalizer"] = {"type": "NFC"} if pre == "qwen2" else None
    state["model"]["ignore_merges"] = pre == "llama-bpe"
    (folder / "tokenizer.json").write_text(json.dumps(state))
    write_gguf_tokenizer(tmp_path / "m.gguf", folder, pre)
    ours, theirs = Tokenizer(tmp_path / "m.gguf", "none"), Tokenizer(folder, "none")
    text = "".join(CORPUS[:3]) + "I'LL  pay 1234567 in 2026!\r\n\n\tcafe\u0301 ..//x <s>"
    assert ours.question_tokens(text) == theirs.question_tokens(text)


@pytest.mark.parametrize("flags", [{}, {"add_space_prefix": True}, {"add_space_prefix": False}])
def test_gguf_tokenizers_of_sentencepiece(tmp_path, monkeypatch, flags):
    """Are those of the folder that they come from, and not of another one beside them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = train_tokenizer(tmp_path / "hf", "llama2")
    state = json.loads((folder / "tokenizer.json").read_text())
    if not flags.get("add_space_prefix", True):
        del state["normalizer"]["normalizers"][0]
        del state["decoder"]["decoders"][-1]
        (folder / "tokenizer.json").write_text(json.dumps(state))
    path = train_tokenizer(tmp_path / "other", "llama3") / "m.gguf"
    write_gguf_tokenizer(path, folder, "default", is_sentencepiece=True, **flags)
    ours, theirs = Tokenizer(path, "none"), Tokenizer(folder, "none")
    for text in ("The quick brown fox", "  The  dog\nIt's", "\u00e9\u4f60 <s> x", "\n a"):
        tokens = ours.question_tokens(text)
        assert tokens == theirs.question_tokens(text)
        assert ours.decode(tokens) == text
    assert ours.text_tokens("a")[0] == ours._tokenizer.bos_token_id  # llama.cpp's default


@pytest.mark.parametrize("pre", ["default", "chatglm-bpe", None])
def test_gguf_tokenizers_of_unknown_cuts_are_refused(tmp_path, pre):
    write_gguf_tokenizer(tmp_path / "m.gguf", train_tokenizer(tmp_path / "hf", "llama3"), pre)
    with pytest.raises(UserError, match=rf"tokenizer.ggml.pre is '{pre or '.none.'}', by which"):
        Tokenizer(tmp_path / "m.gguf")


def test_digits_of_smollm2_are_tokens_of_their_own(smollm2_plain):
    assert len(smollm2_plain.question_tokens("7463343")) == 7


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("tokenizer.json", content) for content in ("", "[]", "{}", '{"model": 3}', "\xff")),
        *(("tokenizer_config.json", content) for content in ("", "[]", "[" * 100000, "\xff")),
        ("tokenizer.json", "[" * 100000),
    ],
)
def test_tokenizer_files_of_the_wrong_shape(tmp_path, name, content):
    train_tokenizer(tmp_path, "llama3")
    (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded") as error:
        Tokenizer(tmp_path, "none").context_tokens("The dog")
    assert "\n" not in str(error.value)
