"""Tokenizers out of GGUF files, cut up as the model's own is.

A GGUF file has a tokenizer's pieces; how texts are cut before pieces are merged it only names.
Source: llama.cpp's src/llama-vocab.cpp, the models' own tokenizer.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from star_attention.errors import UserError
from star_attention.models.fields import Fields
from star_attention.models.gguf_file import read_header

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"


@dataclass(frozen=True)
class _Cut:
    """How texts are cut before merging.

    Attributes:
        regex: what is merged; None: words as GPT-2 sees them.
        single_digits: each is a piece of its own.
        nfc: texts are composed first.
        whole_words: pieces that are a word are taken without merging.
        opens: texts have an opening token if the file does not say.
    """

    regex: str | None = None
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    opens: bool = False


_LLAMA3 = _Cut(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", whole_words=True, opens=True)
_QWEN2 = _Cut(rf"{_WORDS}|\p{{N}}|{_REST}", nfc=True)
_CUTS = {
    "gpt-2": _Cut(),
    "smollm": _Cut(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Cut(
        rf"{_CASES}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        whole_words=True,
        opens=True,
    ),
}


def read_gguf_tokenizer(path: Path, load: Callable[..., Any]) -> Any:
    """The file's tokenizer, as transformers'.

    Args:
        load: AutoTokenizer's way to read it, of a folder.

    Raises:
        UserError: it is of a kind that is not known.
    """
    header = read_header(path)
    kind = header.word("tokenizer.ggml.model", "(none)")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{path}: tokenizer.ggml.model is {kind!r}: use gpt2 or llama")
    cut = _cut_of(path, header) if kind == "gpt2" else None
    options = {}
    if cut and cut.opens and "tokenizer.ggml.add_bos_token" not in header:
        options["add_bos_token"] = True
    with tempfile.TemporaryDirectory() as alone:  # a tokenizer.json beside it would win
        (Path(alone) / "model.gguf").symlink_to(path.resolve())
        tokenizer = load(Path(alone), gguf_file="model.gguf", **options)
    if cut:
        _cut(cut, tokenizer.backend_tokenizer)
    else:
        prefix = "tokenizer.ggml.add_space_prefix"
        _cut_at_spaces(tokenizer.backend_tokenizer, prefix not in header or header.flag(prefix))
    return tokenizer


def _cut_of(path: Path, header: Fields) -> _Cut:
    name = header.word("tokenizer.ggml.pre", "(none)")
    if name not in _CUTS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre is {name!r}, by which texts would be cut otherwise than "
            f"the model knows: use a file with one of {', '.join(_CUTS)}, or a Hugging Face folder"
        )
    return _CUTS[name]


def _cut(cut: _Cut, backend: Any) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True)] if cut.single_digits else []
    if cut.regex:
        steps.append(pre_tokenizers.Split(Regex(cut.regex), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if cut.nfc:
        backend.normalizer = normalizers.NFC()
    backend.model.ignore_merges = cut.whole_words


def _cut_at_spaces(backend: Any, has_prefix: bool) -> None:
    """As SentencePiece: spaces are written as a sign, and with a prefix there is one in front."""
    from tokenizers import decoders, normalizers

    signs = [normalizers.Replace(" ", "\u2581")]
    texts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        signs.insert(0, normalizers.Prepend("\u2581"))
        texts.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(signs)
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(texts)
