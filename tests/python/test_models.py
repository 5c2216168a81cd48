import json
import shutil

import numpy as np
import pytest
import torch

from helpers import LLAMA3_ROPE, forced_logits, hf_logits, save_tiny_model
from star_attention.distributed import SingleProcess
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions
from star_attention.errors import UserError
from star_attention.models.checkpoint import find_model, open_checkpoint
from star_attention.models.config import ModelConfig, RopeConfig
from star_attention.models.loading import load_weights
from star_attention.models.rotary import rotary_frequencies
from star_attention.runtime.leader import lead_together

TOKENS = np.random.default_rng(0).integers(0, 97, 50).astype(np.int32)


def logits_of(folder, dtype="float32"):
    """The last ten tokens' logits, the others being one block of context."""
    from star_attention import StarConfig

    engine = load_engine(folder, SingleProcess(), 16, EngineOptions(dtype=dtype))
    leader, _ = lead_together(engine, SingleProcess())
    context = leader.encode(TOKENS[:40], StarConfig(attention="dense", tokens_per_block=16))
    return forced_logits(leader, context, TOKENS[40:], [])


def hf_causal_logits(model):
    return hf_logits(model.float(), TOKENS, np.tri(50, dtype=bool))[40:]


@pytest.mark.parametrize(
    ("architecture", "dtype", "shards", "overrides"),
    [
        ("llama", torch.float32, False, {"tie_word_embeddings": True}),
        ("llama", torch.bfloat16, True, {}),
        ("llama", torch.float16, False, {"num_key_value_heads": 4}),
        ("llama", torch.float32, False, {"head_dim": 32}),
        (
            "llama",
            torch.float32,
            False,
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 3.0,
                    "rope_theta": 5000.0,
                }
            },
        ),
        ("mistral", torch.float32, False, {"sliding_window": None}),
        ("qwen2", torch.float32, True, {}),
    ],
)
def test_hf_folder(tmp_path, architecture, dtype, shards, overrides):
    model = save_tiny_model(tmp_path, architecture, dtype, shards, **overrides)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not shards
    np.testing.assert_allclose(logits_of(tmp_path), hf_causal_logits(model), atol=1e-4)


def test_bfloat16_computation(tmp_path):
    """bf16 keeps 8 bits: over a few layers logits agree to a few per cent of their spread."""
    model = save_tiny_model(tmp_path)
    wanted = hf_causal_logits(model)
    error = np.abs(logits_of(tmp_path, "bfloat16") - wanted).max()
    assert 0 < error < 0.05 * np.abs(wanted).max()


def test_llama3_rope_matches_hf():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        **LLAMA3_ROPE,
        "rope_theta": 500000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=128, hidden_size=4096, rope_parameters=parameters)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    rope = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    torch.testing.assert_close(rotary_frequencies(rope, 128), wanted)


def write_gguf(path, hf_model, architecture, split=0, **metadata):
    """A GGUF file of a tiny model, as llama.cpp's converter lays it out; `split` into files of so
    many tensors."""
    import gguf

    config = hf_model.config
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split, small_first_shard=False)
    for name, value in metadata.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_string
        add(name.replace("__", "."), value)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    types = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
    names = gguf.get_tensor_name_map(types[architecture], config.num_hidden_layers)
    head_dim = config.hidden_size // config.num_attention_heads
    for name, tensor in hf_model.state_dict().items():
        array = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            halves = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    if "llama3" in config.rope_parameters["rope_type"]:
        parameters = config.rope_parameters
        scaled = rotary_frequencies(
            RopeConfig(
                parameters["rope_theta"],
                "llama3",
                parameters["factor"],
                parameters["low_freq_factor"],
                parameters["high_freq_factor"],
                parameters["original_max_position_embeddings"],
            ),
            head_dim,
        )
        plain = rotary_frequencies(RopeConfig(parameters["rope_theta"]), head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [("llama", {}), ("llama", {"rope_parameters": LLAMA3_ROPE}), ("qwen2", {})],
)
def test_gguf(tmp_path, architecture, overrides):
    model = save_tiny_model(tmp_path / "hf", architecture, **overrides)
    write_gguf(tmp_path / "model.gguf", model, architecture)
    np.testing.assert_allclose(
        logits_of(tmp_path / "model.gguf"), hf_causal_logits(model), atol=1e-4
    )


def load(path):
    checkpoint = open_checkpoint(find_model(str(path)))
    return load_weights(checkpoint, torch.float32, torch.device("cpu"))


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def test_missing_shard(tmp_path):
    save_tiny_model(tmp_path, shards=True)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"the shard {shard.name} is missing"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 20, 2000])
def test_truncated_safetensors(tmp_path, keep):
    save_tiny_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="is truncated or not safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.9])
def test_truncated_gguf(tmp_path, smollm2, share):
    whole = smollm2.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match="is truncated or not GGUF"):
        load(path)


def test_not_gguf(tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("not a model " * 100)
    with pytest.raises(UserError, match="is truncated or not GGUF"):
        load(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match="pickle checkpoints are refused"):
            find_model(str(path))


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such folder or file"):
        find_model(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"no \*\.safetensors and no \.gguf"):
        find_model(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"use a Hugging Face folder or a \.gguf file"):
        find_model(str(tmp_path / "notes.txt"))
    shutil.copy(tmp_path / "notes.txt", tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"the folder has no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"num_hidden_layers": None}, "config.json lacks 'num_hidden_layers'"),
        ({"num_key_value_heads": 3}, "4 query heads, which its 3 KV heads do not divide"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope scaling 'yarn' is not supported: use default, linear or llama3",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
            "sliding_window 64 is not supported",
        ),
        ({"intermediate_size": 100}, "has shape .* the config asks for"),
        ({"num_hidden_layers": 4}, "the weights lack model.layers.3"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, changes, message):
    save_tiny_model(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_old_and_new_rope_fields():
    base = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "vocab_size": 10,
        "max_position_embeddings": 100,
    }
    old = {**base, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {**base, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert ModelConfig.from_hf(old).rope == ModelConfig.from_hf(new).rope
    assert ModelConfig.from_hf(old).num_kv_heads == 2
