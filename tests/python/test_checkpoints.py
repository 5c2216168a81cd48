"""Files that are not what they seem: read as Hugging Face and llama.cpp do, or refused by name."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import save_tiny_model, train_tokenizer
from star_attention.config import StarConfig
from star_attention.distributed import SingleProcess
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions
from star_attention.errors import UserError
from star_attention.models.checkpoint import find_model, open_checkpoint
from star_attention.models.config import ExpertsConfig, ModelConfig
from star_attention.models.fingerprint import fingerprint
from star_attention.models.tokenizer import Tokenizer
from star_attention.runtime.leader import lead_together
from test_models import edit_config, hf_causal_logits, load, logits_of, write_gguf

BASE = {
    "num_hidden_layers": 2,
    "hidden_size": 640,
    "intermediate_size": 64,
    "num_attention_heads": 64,
    "vocab_size": 10,
    "max_position_embeddings": 32768,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, save_tiny_model(folder)


@pytest.fixture
def model(tmp_path, tiny):
    """A copy to change."""
    return shutil.copytree(tiny[0], tmp_path / "model")


def edit_weights(folder, change):
    """`change` edits the tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def hf_says(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


# Of checkpoints that people have: which method their config.json names.
QUANTISED = [
    ({"quant_method": "fp8", "fmt": "e5m2"}, "'fp8'"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt'"),
    ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "'compressed-tensors'"),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}},
        },
        "'compressed-tensors'",
    ),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes'"),
    ({"bits": 4, "group_size": 128}, "'unnamed method'"),
]


@pytest.mark.parametrize(("quantization", "method"), QUANTISED)
def test_quantised_configs(model, quantization, method):
    edit_config(model, quantization_config=quantization)
    with pytest.raises(UserError, match=f"weights are quantised .{method}"):
        open_checkpoint(model)
    edit_config(model, quantization_config=None)
    load(model)


def test_quantised_by_modelopt(model):
    described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (model / "hf_quant_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"weights are quantised .'NVFP4' in hf_quant_config"):
        open_checkpoint(model)


PROJECTION = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{PROJECTION}_scale", torch.ones(1), r"1 weight of another .*: '.*weight_scale'"),
        (PROJECTION, torch.ones(96, 64).to(torch.float8_e4m3fn), "stored as F8_E4M3, which is not"),
        (PROJECTION, torch.ones(96, 64).to(torch.int8), "stored as I8, which is not read"),
        (PROJECTION, None, f"the weights lack {PROJECTION}"),
        (PROJECTION, torch.ones(96, 32), "up_proj.weight has shape .96, 32., the config asks for"),
        (
            "model.layers.3.mlp.up_proj.weight",
            torch.ones(96, 64),
            "1 weight of another architecture",
        ),
        ("model.layers.0.self_attn.o_proj.bias", torch.ones(64), "o_proj.bias"),
    ],
)
def test_other_weights(model, name, tensor, message):
    def change(tensors):
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    edit_weights(model, change)
    with pytest.raises(UserError, match=message):
        load(model)


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(model, tiny):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(model, lambda tensors: tensors.update({name: torch.ones(8)}))
    np.testing.assert_allclose(logits_of(model), hf_causal_logits(tiny[1]), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "architecture None is not supported: use LlamaForCausalLM, Mistral"),
        ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not supported"),
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported"),
        ({"architectures": ["Ministral3ForCausalLM"]}, "Ministral3ForCausalLM is not supported"),
    ],
)
def test_models_are_refused_before_weights_are_read(tmp_path, config, message):
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **config}))
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("architecture", ["mamba", "llama4", "phimoe", "qwen35"])
def test_gguf_models_are_refused_before_weights_are_read(tmp_path, architecture):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        write()
    message = f"GGUF architecture {architecture} is not supported: use llama, qwen2, qwen3, qwen3mo"
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("others", ["consolidated.safetensors", "stale index"])
def test_model_safetensors_wins(model, tiny, tmp_path, others):
    stale = save_tiny_model(tmp_path / "stale", shards=True, num_hidden_layers=2)
    if others == "stale index":
        for path in (tmp_path / "stale").glob("model*safetensors*"):
            shutil.copy(path, model)
    else:
        save_file({"tok_embeddings.weight": torch.ones(97, 64)}, model / others)
        save_file(dict(stale.state_dict()), model / "zzz.safetensors")
    wanted = hf_causal_logits(hf_says(model))
    np.testing.assert_allclose(logits_of(model), wanted, atol=1e-4)
    np.testing.assert_allclose(wanted, hf_causal_logits(tiny[1]), atol=1e-6)


def test_the_index_wins_over_other_files(tmp_path):
    model = save_tiny_model(tmp_path, shards=True)
    save_file({"x": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    np.testing.assert_allclose(logits_of(tmp_path), hf_causal_logits(model), atol=1e-4)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor model.* but consolidated"):
        load(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        *("[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "[" * 100000, "\xff"),
        *('{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": ""}}'),
    ],
)
def test_damaged_index(model, index):
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(index, "latin-1")
    with pytest.raises(UserError, match=r"index.json") as error:
        load(model)
    assert "\n" not in str(error.value)


MEMORY = """
import sys, threading, time
from pathlib import Path
import torch
from star_attention.models.checkpoint import open_checkpoint
from star_attention.models.loading import load_weights

def own_memory():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10

def watch():
    while not done:
        peak.append(own_memory())
        time.sleep(1e-3)

torch.ones(1 << 10) @ torch.ones(1 << 10)
checkpoint = open_checkpoint(Path(sys.argv[1]))
before, peak, done = own_memory(), [], []
watcher = threading.Thread(target=watch)
watcher.start()
weights = load_weights(checkpoint, getattr(torch, sys.argv[2]), torch.device("cpu"))
done.append(True)
watcher.join()
print(max(peak) - before)
"""


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.5), ("float32", 1.1)])
def test_memory_that_loading_takes(tmp_path, dtype, share):
    """At no time more than the weights as they are computed with; those that are stored like that,
    and are not stacked, stay in the file."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 32000}
    save_tiny_model(tmp_path, dtype=torch.bfloat16, num_hidden_layers=6, **sizes)
    stored = (tmp_path / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEMORY, tmp_path, dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) < share * stored * getattr(torch, dtype).itemsize / 2


def test_a_tensor_in_two_shards(tmp_path):
    save_tiny_model(tmp_path, shards=True)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    tensors = load_file(second)
    save_file({**tensors, next(iter(load_file(first))): torch.ones(1)}, second)
    with pytest.raises(UserError, match="is in two files"):
        load(tmp_path)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored(tmp_path, equal):
    save_tiny_model(tmp_path, tie_word_embeddings=True)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 if equal else 2)

    edit_weights(tmp_path, change)
    np.testing.assert_allclose(logits_of(tmp_path), hf_causal_logits(hf_says(tmp_path)), atol=1e-4)


def test_end_tokens_of_both_configs(model):
    edit_config(model, eos_token_id=2)
    path = model / "generation_config.json"
    path.write_text('{"eos_token_id": [5, 2, 7]}')
    assert open_checkpoint(model).config.eos_token_ids == (2, 5, 7)
    path.unlink()
    assert open_checkpoint(model).config.eos_token_ids == (2,)
    path.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id is '</s>': use tok"):
        open_checkpoint(model)


LLAMA, MISTRAL, QWEN2 = "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"
MINISTRAL, MIXED = "MinistralForCausalLM", ["full_attention", "sliding_attention"]
GEMMA2, GEMMA3 = "Gemma2ForCausalLM", "Gemma3ForCausalLM"
LINEAR = {"rope_type": "linear", "factor": 8.0}
QWEN3, QWEN3_MOE, PHI3 = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Phi3ForCausalLM"


@pytest.mark.parametrize(
    ("name", "config", "kv_heads", "longest"),
    [
        (LLAMA, {"sliding_window": 8}, 64, None),
        (MISTRAL, {"sliding_window": None}, 8, None),
        (MISTRAL, {"sliding_window": 32768}, 8, 32768),
        ("MinistralForCausalLM", {"sliding_window": None}, 8, None),
        (
            "MinistralForCausalLM",
            {"sliding_window": 40000, "layer_types": ["full_attention", "sliding_attention"]},
            8,
            40000,
        ),
        (QWEN2, {"sliding_window": 8}, 32, None),
        (QWEN2, {"num_key_value_heads": None}, 64, None),
        (QWEN2, {"use_sliding_window": True}, 32, None),
        (QWEN3, {"sliding_window": 8}, 32, None),
        (QWEN3_MOE, {"use_sliding_window": True, "sliding_window": 32768}, 4, 32768),
        (PHI3, {}, 64, None),
        (PHI3, {"sliding_window": 262144}, 64, 262144),
        (GEMMA2, {}, 4, None),
        (GEMMA2, {"attn_logit_softcapping": None, "final_logit_softcapping": None}, 4, None),
        (GEMMA2, {"tie_word_embeddings": False, "query_pre_attn_scalar": 144}, 4, None),
        (GEMMA3, {}, 4, None),
        (GEMMA3, {"final_logit_softcapping": 20.0, "rope_theta": 5e5}, 4, None),
        (GEMMA3, {"rope_local_base_freq": 777.0, "rope_scaling": LINEAR}, 4, None),
        (GEMMA3, {"rope_parameters": {"full_attention": LINEAR}}, 4, None),
    ],
)
def test_what_a_config_leaves_out(name, config, kv_heads, longest):
    """Is as in Hugging Face's class."""
    import transformers

    config = {**BASE, **config}
    ours = ModelConfig.from_hf({**config, "architectures": [name]})
    assert (ours.num_kv_heads, ours.longest_text) == (kv_heads, longest)
    options = {"pad_token_id": 0} if name == PHI3 else {}
    kind = "TextConfig" if name == GEMMA3 else "Config"
    theirs = getattr(transformers, name.replace("ForCausalLM", kind))(**config, **options)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert theirs.num_key_value_heads == kv_heads
    assert ours.head_dim == head_dim
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    rope = theirs.rope_parameters
    if name == GEMMA3:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        assert (ours.window_rope.theta, ours.window_rope.scaling) == (
            local["rope_theta"],
            "default",
        )
        assert local["rope_type"] == "default"
    assert ours.rope.theta == rope["rope_theta"]
    assert ours.rope.scaling == rope["rope_type"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    if ours.has_output_norms:
        assert ours.attention_scale == theirs.query_pre_attn_scalar**-0.5
        assert ours.logit_cap == theirs.final_logit_softcapping
        assert ours.score_cap == (theirs.attn_logit_softcapping if name == GEMMA2 else None)
    if ours.experts:
        assert ours.experts == ExpertsConfig(
            theirs.num_experts,
            theirs.num_experts_per_tok,
            theirs.moe_intermediate_size,
            theirs.norm_topk_prob,
        )


@pytest.mark.parametrize(
    ("name", "config", "window", "layers"),
    [
        (MISTRAL, {}, 4096, (0, 1)),
        (MISTRAL, {"sliding_window": 8}, 8, (0, 1)),
        (MINISTRAL, {}, 4096, (0, 1)),
        (MINISTRAL, {"layer_types": MIXED}, 4096, (1,)),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 1}, 4096, (1,)),
        (QWEN2, {"use_sliding_window": True, "layer_types": MIXED}, 4096, (1,)),
        (QWEN3, {"use_sliding_window": True, "max_window_layers": 0}, 4096, (0, 1)),
        (QWEN3_MOE, {"use_sliding_window": True, "sliding_window": 7}, 7, (0, 1)),
        (PHI3, {"sliding_window": 2047}, 2047, (0, 1)),
        (GEMMA2, {"num_hidden_layers": 5}, 4096, (0, 2, 4)),
        (GEMMA2, {"layer_types": MIXED}, 4096, (1,)),
        (GEMMA3, {"num_hidden_layers": 7}, 4096, (0, 1, 2, 3, 4, 6)),
        (GEMMA3, {"sliding_window_pattern": 2, "sliding_window": 512}, 512, (0,)),
        (GEMMA3, {"sliding_window": None}, None, ()),
    ],
)
def test_windows(name, config, window, layers):
    ours = ModelConfig.from_hf({**BASE, **config, "architectures": [name]})
    assert (ours.window, ours.windowed_layers, ours.longest_text) == (window, layers, None)
    assert ModelConfig.from_dict(json.loads(json.dumps(asdict(ours)))) == ours


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (QWEN2, {"layer_types": MIXED}, "has sliding_attention, but no window is used"),
        (MINISTRAL, {"layer_types": MIXED[:1]}, "layer_types should be a list of 2 of full_attent"),
        (LLAMA, {"layer_types": MIXED}, "layer_types should be a list of 2 of full_attention"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window is 0: use a whole number"),
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported: use"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supp"),
    ],
)
def test_windows_that_are_wrong(name, config, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf({**BASE, **config, "architectures": [name]})


def test_a_text_beyond_the_window_is_refused(tmp_path):
    save_tiny_model(tmp_path, "mistral", sliding_window=512)
    llm_config = StarConfig(attention="dense", tokens_per_block=16)
    leader, _ = lead_together(
        load_engine(tmp_path, SingleProcess(), 16, EngineOptions()), SingleProcess()
    )
    leader.encode(np.arange(512, dtype=np.int32) % 97, llm_config)
    with pytest.raises(UserError, match=r"513 tokens: beyond 512 the model has a sliding window"):
        leader.encode(np.arange(513, dtype=np.int32) % 97, llm_config)


WRONG_VALUES = [
    ("hidden_size", "64"),
    ("hidden_size", 0),
    ("hidden_size", -64),
    ("hidden_size", 64.0),
    ("num_hidden_layers", True),
    ("num_hidden_layers", 10**9),
    ("vocab_size", 1 << 70),
    ("num_attention_heads", [4]),
    ("head_dim", 15),
    ("rms_norm_eps", "1e-5"),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", 10**400),
    ("rope_theta", -1),
    ("tie_word_embeddings", "false"),
    ("hidden_act", None.__class__.__name__),
    ("eos_token_id", {}),
    ("architectures", {}),
    ("architectures", [["LlamaForCausalLM"]]),
    ("architectures", ["two\nlines"]),
    ("quantization_config", []),
    ("rope_parameters", "linear"),
    ("rope_parameters", {"rope_type": "llama3", "factor": 0}),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ("layer_types", 3),
]


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_wrong_values_in_config(model, name, value):
    edit_config(model, **{name: value})
    with pytest.raises(UserError) as error:
        load(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_experts", 10**9),
        ("num_experts_per_tok", 0),
        ("moe_intermediate_size", "40"),
        ("norm_topk_prob", 1),
        ("mlp_only_layers", "1"),
        ("decoder_sparse_step", 0),
    ],
)
def test_wrong_values_of_experts(tmp_path, name, value):
    """Are refused at once."""
    save_tiny_model(tmp_path, "qwen3_moe")
    edit_config(tmp_path, **{name: value})
    begin = time.perf_counter()
    with pytest.raises(UserError, match=f"{name} is|the model has {value}"):
        load(tmp_path)
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{", "[" * 100000, "\xff", '{"a": "\\ud800"}']
)
def test_configs_that_are_none(model, content):
    (model / "config.json").write_text(content, "latin-1")
    with pytest.raises(UserError) as error:
        load(model)
    assert "\n" not in str(error.value)


def test_a_config_with_a_byte_order_mark(model):
    text = (model / "config.json").read_text()
    (model / "config.json").write_text("\ufeff" + text, "utf-8")
    load(model)


def gguf_parts(folder, hf_model, **metadata):
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(folder / "m.gguf", hf_model, "llama", split=10, **metadata)
    return sorted(folder.glob("*.gguf"))


def test_split_gguf(tmp_path, tiny):
    parts = gguf_parts(tmp_path, tiny[1])
    assert [part.name for part in parts][1:] == ["m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]
    for named in (tmp_path, *parts):
        assert find_model(str(named)) == parts[0]
    np.testing.assert_allclose(logits_of(parts[0]), hf_causal_logits(tiny[1]), atol=1e-4)


def test_split_gguf_that_is_incomplete(tmp_path, tiny):
    parts = gguf_parts(tmp_path / "parts", tiny[1])
    parts[2].rename(tmp_path / "elsewhere")
    for named in (tmp_path / "parts", *parts[:2]):
        with pytest.raises(UserError, match=r"m-00003-of-00003.gguf is missing, of the 3 files"):
            load(named)
    shutil.copy(parts[1], parts[2])
    with pytest.raises(UserError, match="is part 2 of 3, which is not its name"):
        load(parts[0])
    (tmp_path / "elsewhere").replace(parts[2])
    shutil.copy(parts[0], tmp_path / "whole.gguf")
    with pytest.raises(UserError, match="is part 1 of 3, which is not its name"):
        load(tmp_path / "whole.gguf")


def test_two_models_in_one_folder(tmp_path, tiny):
    gguf_parts(tmp_path, tiny[1])
    write_gguf(tmp_path / "other.gguf", tiny[1], "llama")
    with pytest.raises(UserError, match=r"has 2 .gguf models: name one"):
        find_model(str(tmp_path))


def test_gguf_attention_biases(tmp_path):
    """As llama.cpp writes a Llama with biases of Q, K and V: their rows in its order too."""
    hf_model = save_tiny_model(tmp_path, "qwen2")
    write_gguf(tmp_path / "m.gguf", hf_model, "llama")
    np.testing.assert_allclose(
        logits_of(tmp_path / "m.gguf"), hf_causal_logits(hf_model), atol=1e-4
    )


def test_gguf_weights_that_would_not_be_read(tmp_path):
    hf_model = save_tiny_model(tmp_path, attention_bias=True)
    write_gguf(tmp_path / "m.gguf", hf_model, "llama", extra="blk.0.attn_k_norm.weight")
    with pytest.raises(UserError, match=r"1 weight of another .*'blk.0.attn_k_norm.weight'"):
        load(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", save_tiny_model(tmp_path), "qwen2")
    with pytest.raises(UserError, match=r"the weights lack blk.0.attn_q.bias"):
        load(tmp_path / "m.gguf")


def test_gguf_end_tokens(tmp_path, tiny):
    ends = {
        f"tokenizer.ggml.{name}_token_id": 5 + n for n, name in enumerate(("eos", "eot", "eom"))
    }
    write_gguf(tmp_path / "m.gguf", tiny[1], "llama", **ends)
    assert open_checkpoint(tmp_path / "m.gguf").config.eos_token_ids == (5, 6, 7)


@pytest.mark.parametrize(
    ("window", "expected"),
    [(64, (64, (0, 1, 2), None)), (512, (None, (), 512)), (0, (None, (), None))],
)
def test_gguf_windows(tmp_path, tiny, window, expected):
    write_gguf(tmp_path / "m.gguf", tiny[1], "llama", **{WINDOW: window})
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert (config.window, config.windowed_layers, config.longest_text) == expected


WINDOW = "llama.attention.sliding_window"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count is 8: not supported"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8: use 16"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported: use"),
        ({"llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5: not supported"),
        ({"llama.attention.value_length": 32}, "value_length is 32: use 16"),
        ({"llama.attention.key_length": "x"}, "key_length is 'x': use a whole number"),
    ],
)
def test_gguf_models_that_are_others(tmp_path, tiny, metadata, message):
    write_gguf(tmp_path / "m.gguf", tiny[1], "llama", **metadata)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "m.gguf")


def test_gguf_types_that_are_not_read(tmp_path, tiny):
    write_gguf(tmp_path / "m.gguf", tiny[1], "llama")
    data = (tmp_path / "m.gguf").read_bytes()
    name = b"blk.0.ffn_up.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8
    kind = int(gguf.GGMLQuantizationType.I32).to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(data[:place] + kind + data[place + 4 :])
    with pytest.raises(UserError, match=r"blk.0.ffn_up.weight is stored as I32, which is not read"):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_hub_names_are_those_of_the_local_cache(tmp_path, tiny, variable):
    hub = tmp_path / "hub"
    snapshot = hub / "models--org--tiny" / "snapshots" / "abc"
    shutil.copytree(tiny[0], snapshot)
    (hub / "models--org--tiny" / "refs").mkdir()
    (hub / "models--org--tiny" / "refs" / "main").write_text("abc")
    value = {"HF_HOME": tmp_path, "HF_HUB_CACHE": hub}[variable]
    code = (
        "import socket\n"
        "socket.socket.connect = None  # no network\n"
        "from star_attention.errors import UserError\n"
        "from star_attention.models.checkpoint import find_model\n"
        "print(find_model('org/tiny'))\n"
        "try:\n    find_model('org/other')\n"
        "except UserError as error:\n    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), variable: str(value)},
    )
    assert run.stdout == (
        f"{snapshot}\n--model org/other: no such folder, and not in the Hugging Face cache {hub}: "
        "hf download org/other puts it there\n"
    )


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "~nobody-has-this-name/x"])
def test_names_that_are_none(name):
    with pytest.raises(UserError, match="--model"):
        find_model(name)


@pytest.fixture
def nobody(tiny):
    """A copy of the model in a folder that everybody may enter, and a user who may do no more."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        folder = shutil.copytree(tiny[0], Path(name) / "model")
        train_tokenizer(folder, "llama3")
        write_gguf(folder.parent / "m.gguf", tiny[1], "llama")
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        yield folder
        if is_root:
            os.seteuid(0)


def withdraw(path):
    user = os.geteuid()
    if os.getuid() == 0:
        os.seteuid(0)
    path.chmod(0)
    os.seteuid(user)


@pytest.mark.parametrize(
    "name", ["", "config.json", "model.safetensors", "tokenizer.json", "../m.gguf"]
)
def test_files_that_may_not_be_read(nobody, name):
    path = (nobody / name).resolve()
    withdraw(path)
    model = path if path.suffix == ".gguf" else nobody

    def read():
        found = find_model(str(model))
        open_checkpoint(found)
        Tokenizer(found, "none")

    with pytest.raises(UserError, match=r"cannot be (read|loaded): .*([Pp]ermission|tokenizer)"):
        read()


def test_fingerprints_of_files_that_may_not_be_read(nobody):
    withdraw(nobody)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        fingerprint(nobody)
