"""Damaged model files: the right model, or one line that says what is wrong.

2,600 examples, always the same ones; STAR_ATTENTION_FUZZ=10 takes ten times as many, random ones.
"""

import copy
import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import processors

from helpers import (
    LONG_ROPE,
    MODELS,
    YARN_ROPE,
    forced_logits,
    hf_logits,
    save_tiny_model,
    train_tokenizer,
)
from star_attention import StarConfig
from star_attention.distributed import SingleProcess
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions
from star_attention.errors import UserError
from star_attention.models import tokenizer as tokenizers
from star_attention.models.checkpoint import find_model, open_checkpoint
from star_attention.models.fingerprint import fingerprint
from star_attention.models.loading import load_weights
from star_attention.models.weights import weight_table
from star_attention.runtime.leader import lead_together
from test_models import write_gguf
from test_tokenizer import write_gguf_tokenizer

CPU = torch.device("cpu")
TEXT = "The quick brown fox's 12345 \u00e9\u4f60\n\n jumps"
TOKENS = np.arange(20, dtype=np.int32)


def fuzz(examples):
    factor = int(os.environ.get("STAR_ATTENTION_FUZZ", 0))
    return settings(
        max_examples=examples * max(1, factor),
        derandomize=not factor,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def one_line(action):
    """What `action` gives; None if it refuses the files in one line."""
    try:
        return action()
    except UserError as error:
        refusal = str(error)
    assert refusal.strip()
    assert "\n" not in refusal
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    save_tiny_model(folder, vocab_size=64, max_position_embeddings=256, **sizes)
    return folder


SCALED = {
    "yarn": ("llama", {"rope_parameters": YARN_ROPE, "attention_bias": True}),
    "phi3": (
        "phi3",
        {
            "rope_parameters": {**LONG_ROPE, "short_factor": [1, 2, 3], "long_factor": [4, 5, 6]},
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 16, "mlp_only_layers": [0]}),
}


@pytest.fixture(scope="module", params=SCALED)
def other_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    architecture, options = SCALED[request.param]
    save_tiny_model(folder, architecture, vocab_size=64, **sizes, **options)
    return folder


NUMBERS = (0, 1, -1, 2, 3, 7, 1 << 31, 1 << 62, 1 << 64, 10**400, 0.5, -0.0, 1e-300, 1e300)
WORDS = ("", "1", "true", "null", "a\nb", "\ud800", "x" * 5000, "silu", "gelu", "linear", "default")
ODD = st.sampled_from(
    [
        *(*NUMBERS, float("inf"), float("nan"), None, True, False, [], [1], [[]], [None], {}),
        *(*WORDS, "llama3", "yarn", "longrope", "dynamic", {"a": 1}, [1.0] * 4, [0.5, 2, 3, 4]),
        *(["MistralForCausalLM"], ["Qwen2ForCausalLM"], ["Qwen3ForCausalLM"]),
    ]
).map(copy.deepcopy)
NAMES = st.sampled_from(
    [
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "head_dim"),
        *("num_key_value_heads", "rope_scaling", "rope_parameters", "rope_theta", "rope_type"),
        *("factor", "partial_rotary_factor", "quantization_config", "attention_bias", "type"),
        *("tie_word_embeddings", "hidden_act", "original_max_position_embeddings", "a\nb", ""),
        *("eos_token_id", "mlp_bias", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        *("truncate", "attention_factor", "short_factor", "long_factor", "num_experts"),
        *("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers"),
        "decoder_sparse_step",
    ]
)


def places(value):
    """Every object and list in a JSON value, with one of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@st.composite
def changed_json(draw, text):
    """A JSON text with some values changed, or some characters."""
    if draw(st.integers(0, 4)) == 0:
        return draw(changed_bytes(text.encode()))
    content = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(content)) if isinstance(content, dict | list) else []
        if not found:
            break
        at, key = found[draw(st.integers(0, len(found) - 1))]
        action = draw(st.integers(0, 3))
        if action == 0:
            del at[key]
        elif action == 1 and isinstance(at, dict):
            at[draw(NAMES)] = draw(ODD)
        elif action == 2 and isinstance(at[key], int | float) and abs(at[key]) < 1e300:
            at[key] = at[key] * draw(st.sampled_from([-1, 2, 3, 0.5, 1000])) + draw(
                st.integers(-1, 1)
            )
        else:
            at[key] = draw(ODD)
    return json.dumps(content).encode()


@st.composite
def changed_bytes(draw, data, size=None):
    """`data` with some of the first `size` bytes changed, inserted, removed, or cut off."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, min(len(data), size or len(data)) - 1)))
        action = draw(st.integers(0, 5))
        if action == 0:
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif action == 1:
            number = draw(st.sampled_from([0, 1, 2, 255, 1 << 20, 1 << 31, 1 << 40, (1 << 64) - 1]))
            data[at : at + 8] = struct.pack("<Q", number)
        elif action == 2:
            data[at:at] = draw(st.binary(max_size=8))
        elif action == 3:
            del data[at : at + draw(st.integers(1, 16))]
        elif action == 4:
            data[at : at + 1] = bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) if data else b""
        else:
            del data[at:]
    return bytes(data)


def logits_of(path):
    """Of the last tokens, the others being one block of context."""
    engine = load_engine(path, SingleProcess(), 16, EngineOptions())
    leader, _ = lead_together(engine, SingleProcess())
    context = leader.encode(TOKENS[:16], StarConfig(attention="dense", tokens_per_block=16))
    return forced_logits(leader, context, TOKENS[16:], [])


def hf_logits_of(path):
    """None if Hugging Face's class does not take the config, or draws weights of its own."""
    import transformers

    name = json.loads((path / "config.json").read_text("utf-8-sig"))["architectures"][0]
    try:
        options = {"local_files_only": True, "dtype": torch.float32, "output_loading_info": True}
        model, found = getattr(transformers, name).from_pretrained(
            path, attn_implementation="eager", **options
        )
        if found["missing_keys"]:
            return None
        return hf_logits(model.eval(), TOKENS, np.tri(len(TOKENS), dtype=bool))[16:]
    except Exception:
        return None


# The examples of a test share its folder.
@pytest.fixture
def model(folder, tmp_path):
    """A copy to change."""
    return shutil.copytree(folder, tmp_path / "model")


@fuzz(700)
@given(data=st.data())
def test_config(folder, model, data):
    check_config(folder, model, data)


@fuzz(200)
@given(data=st.data())
def test_config_of_other_models(other_folder, tmp_path, data):
    model = shutil.copytree(other_folder, tmp_path / "model", dirs_exist_ok=True)
    check_config(other_folder, model, data)


def check_config(folder, model, data):
    text = (folder / "config.json").read_text()
    (model / "config.json").write_bytes(data.draw(changed_json(text)))
    ours = one_line(lambda: logits_of(find_model(str(model))))
    if ours is not None and (theirs := hf_logits_of(model)) is not None:
        np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-3)


@fuzz(100)
@given(data=st.data())
def test_generation_config(model, data):
    content = data.draw(changed_json('{"eos_token_id": [2, 3], "do_sample": false}'))
    (model / "generation_config.json").write_bytes(content)
    checkpoint = one_line(lambda: open_checkpoint(model))
    if checkpoint is not None:
        assert all(isinstance(token, int) for token in checkpoint.config.eos_token_ids)


@fuzz(100)
@given(data=st.data())
def test_index(folder, model, data):
    weights = load_file(folder / "model.safetensors")
    (model / "model.safetensors").unlink(missing_ok=True)
    shutil.copy(folder / "model.safetensors", model / "a.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "a.safetensors")})
    (model / "model.safetensors.index.json").write_bytes(data.draw(changed_json(index)))
    checkpoint = one_line(lambda: open_checkpoint(find_model(str(model))))
    if checkpoint is not None:
        assert all(
            checkpoint.tensor(weight).equal(weights[weight.name])
            for weight in weight_table(checkpoint.config)
        )


@fuzz(500)
@given(data=st.data())
def test_safetensors(folder, model, data):
    path = model / "model.safetensors"
    whole = (folder / path.name).read_bytes()
    size = 8 + struct.unpack_from("<Q", whole)[0]
    if data.draw(st.booleans()):
        header = data.draw(changed_json(whole[8:size].decode()))
        whole = struct.pack("<Q", len(header)) + header + whole[size:]
    else:
        whole = data.draw(changed_bytes(whole, size))
    path.unlink()  # what is mapped is not to change
    path.write_bytes(whole)
    weights = one_line(lambda: load_weights(open_checkpoint(model), torch.float32, CPU))
    if weights is not None:
        embedding = load_file(path)["model.embed_tokens.weight"].float()
        torch.testing.assert_close(weights.embedding, embedding, equal_nan=True)


@pytest.fixture(scope="module", params=["llama", "phi3-long", "qwen3-moe"])
def gguf(request, tmp_path_factory):
    """A file's bytes, and how many of them are the header."""
    from gguf import GGUFReader

    folder = tmp_path_factory.mktemp("gguf")
    architecture, options = MODELS[request.param]
    options = {**options, "num_hidden_layers": 1}
    hf_model = save_tiny_model(folder / "hf", architecture, vocab_size=64, **options)
    path, name = folder / "m.gguf", architecture.replace("_", "")
    write_gguf(path, hf_model, name, **{"tokenizer.ggml.eos_token_id": 2})
    return path.read_bytes(), GGUFReader(path).data_offset


@fuzz(150)
@given(data=st.data())
def test_gguf(gguf, tmp_path, data):
    path = tmp_path / "m.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(data.draw(changed_bytes(*gguf)))
    one_line(lambda: fingerprint(path))
    weights = one_line(lambda: load_weights(open_checkpoint(path), torch.float32, CPU))
    if weights is not None:
        assert weights.lm_head.shape == weights.embedding.shape


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), "llama3")


@fuzz(100)
@given(data=st.data())
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(tokenizer_folder, tmp_path, name, data):
    folder = shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    text = (tokenizer_folder / name).read_text()
    (folder / name).write_bytes(data.draw(changed_json(text)))
    check_tokenizer(folder)


@fuzz(50)
@given(data=st.data())
def test_gguf_tokenizer(tokenizer_folder, tmp_path, monkeypatch, data):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    if not (tmp_path / "whole").exists():
        write_gguf_tokenizer(tmp_path / "whole", tokenizer_folder, "llama-bpe")
    (tmp_path / "m.gguf").unlink(missing_ok=True)
    content = data.draw(changed_bytes((tmp_path / "whole").read_bytes()))
    (tmp_path / "m.gguf").write_bytes(content)
    check_tokenizer(tmp_path / "m.gguf")


def check_tokenizer(path):
    tokenizers._load.cache_clear()
    tokenizers._load_plain.cache_clear()

    def tokens():
        tokenizer = tokenizers.Tokenizer(path)
        ids = tokenizer.context_tokens(TEXT) + tokenizer.question_tokens("What?")
        tokenizer.decode(ids + tokenizer.text_tokens(TEXT).tolist())
        return tokenizer, tokenizer._encode("The quick brown"), ids

    found = one_line(tokens)
    if found is not None:
        tokenizer, plain, ids = found
        assert all(isinstance(token, int) and token >= 0 for token in ids)
        backend = tokenizer._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = processors.Sequence([])
        assert plain == backend.encode("The quick brown", add_special_tokens=False).ids
