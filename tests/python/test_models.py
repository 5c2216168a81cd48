import copy
import json
import shutil
from dataclasses import asdict

import gguf
import numpy as np
import pytest
import torch

from helpers import MODELS, forced_logits, hf_logits, save_tiny_model
from star_attention import StarConfig
from star_attention.distributed import SingleProcess
from star_attention.engines.loader import load_engine
from star_attention.engines.options import EngineOptions
from star_attention.errors import UserError
from star_attention.models.checkpoint import find_model, open_checkpoint
from star_attention.models.config import ModelConfig
from star_attention.models.loading import load_weights
from star_attention.models.rope import RopeConfig
from star_attention.models.rotary import rotary_frequencies, rotary_table
from star_attention.runtime.leader import Leader, lead_together
from star_attention.runtime.sampling import SamplingParams
from star_attention.runtime.worker import Worker

SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "vocab_size": 10,
}
TOKENS = np.random.default_rng(0).integers(0, 97, 50).astype(np.int32)


def logits_of(folder, dtype="float32", **options):
    """The last ten tokens' logits, the others being one block of context."""
    engine = load_engine(folder, SingleProcess(), 16, EngineOptions(dtype=dtype, **options))
    leader, _ = lead_together(engine, SingleProcess())
    context = leader.encode(TOKENS[:40], StarConfig(attention="dense", tokens_per_block=16))
    return forced_logits(leader, context, TOKENS[40:], [])


def hf_causal_logits(model):
    return hf_logits(model.float(), TOKENS, np.tri(50, dtype=bool))[40:]


LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}


@pytest.mark.parametrize(
    ("architecture", "dtype", "shards", "overrides"),
    [
        ("llama", torch.bfloat16, True, {}),
        ("llama", torch.float16, False, {"num_key_value_heads": 4}),
        ("llama", torch.float32, False, {"head_dim": 32}),
        ("llama", torch.float32, False, {"rope_parameters": LINEAR}),
        ("qwen2", torch.float32, True, {}),
        ("qwen3_moe", torch.bfloat16, True, {"head_dim": 32}),
        ("qwen3_moe", torch.float32, False, {"decoder_sparse_step": 2}),
        ("phi3", torch.bfloat16, True, {"tie_word_embeddings": True}),
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


ORIGINAL = {"original_max_position_embeddings": 8192}
ROPES = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"factor": 4.0, **ORIGINAL},
    "yarn-borders": {"factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False, **ORIGINAL},
    "yarn-mscale": {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, **ORIGINAL},
    "yarn-attention": {"factor": 4.0, "attention_factor": 0.9, **ORIGINAL},
    "linear": {"factor": 2.5},
    "longrope": {"short_factor": [1.5] * 64, "long_factor": [4.0] * 64, **ORIGINAL},
    "longrope-factor": {"short_factor": [1.5] * 64, "long_factor": [4.0] * 64, "factor": 8.0},
}


@pytest.mark.parametrize("is_old", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_table_matches_hf(name, is_old):
    """In the spelling of transformers 5, and in the older one."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = name.partition("-")[0]
    scaling = ROPES[name]
    fields = {"architectures": ["LlamaForCausalLM"], **SIZES, "head_dim": 128}
    fields |= {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    if is_old:
        fields |= {"rope_theta": 5e5, "rope_scaling": {"type": kind, **scaling}}
    else:
        fields["rope_parameters"] = {"rope_type": kind, "rope_theta": 5e5, **scaling}
    rope = ModelConfig.from_hf(fields).rope
    hf_config = LlamaConfig(**copy.deepcopy(fields))
    lengths = [None, 200000] if kind == "longrope" else [None]
    table = rotary_table(rope, 128, 16, torch.device("cpu")).view(16, len(lengths), 128)
    for index, length in enumerate(lengths):
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](hf_config, "cpu", seq_len=length)
        angles = torch.arange(16.0)[:, None] * frequencies
        wanted = torch.cat((angles.cos(), angles.sin()), -1) * factor
        torch.testing.assert_close(table[:, index], wanted, atol=1e-5, rtol=1e-5)


def test_longrope_of_short_and_long_texts(tmp_path):
    """One choice for a context and all that is asked about it, Hugging Face's for the whole text,
    here of up to 128 tokens; all are cached at the same time, and those alike share blocks."""
    from transformers import AutoModelForCausalLM

    architecture, overrides = MODELS["phi3-long"]
    save_tiny_model(tmp_path, architecture, **overrides)
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    engine = load_engine(tmp_path, SingleProcess(), 16, EngineOptions())
    worker = Worker(engine, SingleProcess())
    leader = Leader(worker.execute, engine, 1, engine.limits, shares_blocks=True)
    tokens = np.random.default_rng(7).integers(0, 97, 220).astype(np.int32)
    texts = [(context, context + 14) for context in (30, 114, 115, 200)] + [(115, 128), (115, 150)]
    config = StarConfig(attention="dense", tokens_per_block=16)
    contexts = [
        leader.scheduler.add_context(tokens[:context], config, [(5, end - context - 5)])
        for context, end in texts
    ]
    while not all(context.is_ready for context in contexts):
        leader.step()
    assert [context.is_long for context in contexts] == [False, False, True, True, False, True]
    third, fifth, sixth = (contexts[index].blocks for index in (2, 4, 5))
    assert third == sixth != fifth
    for context, (begin, end) in zip(contexts, texts, strict=True):
        question, answer = np.split(tokens[begin:end], [5])
        ours = forced_logits(leader, context, question, answer)
        wanted = hf_logits(hf_model, tokens[:end], np.tri(end, dtype=bool))[begin:]
        np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_longrope_without_questions_leaves_room_for_some(tmp_path):
    architecture, overrides = MODELS["phi3-long"]
    save_tiny_model(tmp_path, architecture, **overrides)
    engine = load_engine(tmp_path, SingleProcess(), 16, EngineOptions())
    leader, _ = lead_together(engine, SingleProcess())
    config = StarConfig(attention="dense", tokens_per_block=16)
    tokens = np.arange(97, dtype=np.int32)
    short, long = (leader.encode(np.resize(tokens, n), config) for n in (96, 97))
    assert (short.is_long, long.is_long) == (False, True)
    leader.scheduler.add_question(short, tokens[:20], SamplingParams(max_tokens=12))
    leader.scheduler.add_question(long, tokens[:20], SamplingParams(max_tokens=2))
    with pytest.raises(UserError, match="have 129 tokens, but the context was read for 128"):
        leader.scheduler.add_question(short, tokens[:20], SamplingParams(max_tokens=13))


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_names_of_longrope(kind):
    """Phi-3's configs have had three."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    base = {"architectures": ["Phi3ForCausalLM"], **SIZES, "max_position_embeddings": 131072}
    config = {**base, "rope_scaling": {"type": kind, **factors}}
    rope = ModelConfig.from_hf({**config, "original_max_position_embeddings": 8192}).rope
    assert (rope.scaling, rope.original_max_position) == ("longrope", 8192)
    assert ModelConfig.from_hf(config).rope.original_max_position == 4096
    llama = {**base, "architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "su"}}
    with pytest.raises(UserError, match="rope scaling 'su' is not supported"):
        ModelConfig.from_hf(llama)


def test_configs_behind_json(tmp_path):
    for name in ("qwen3-moe", "phi3-long", "yarn"):
        architecture, overrides = MODELS[name]
        save_tiny_model(tmp_path / name, architecture, **overrides)
        config = open_checkpoint(tmp_path / name).config
        assert ModelConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_dynamic_rope(tmp_path):
    """Is the plain one up to the length that the model was made for; there is nothing beyond it."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = save_tiny_model(tmp_path, rope_parameters=scaling, max_position_embeddings=50)
    np.testing.assert_allclose(logits_of(tmp_path), hf_causal_logits(model), atol=1e-4)
    engine = load_engine(tmp_path, SingleProcess(), 16, EngineOptions())
    leader, _ = lead_together(engine, SingleProcess())
    message = r"have 51 tokens: beyond 50 .* depends on the text's length"
    config = StarConfig(attention="dense", tokens_per_block=16)
    with pytest.raises(UserError, match=message):
        leader.encode(np.resize(TOKENS, 51), config)
    context = leader.encode(TOKENS[:40], config)
    with pytest.raises(UserError, match=message):
        leader.scheduler.add_question(context, TOKENS[40:45], SamplingParams(max_tokens=6))


def write_gguf(path, hf_model, architecture, split=0, extra=None, **metadata):
    """A GGUF file of a tiny model, as llama.cpp's converter lays it out; `split` into files of so
    many tensors. `extra` is one that the model does not have."""
    config = hf_model.config
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split, small_first_shard=False)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None)
    if head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    names = gguf.get_tensor_name_map(GGUF_TYPES[architecture], config.num_hidden_layers)
    is_gemma = architecture.startswith("gemma")
    for name, tensor in _as_converted(hf_model.state_dict()):
        if is_gemma and name == "lm_head.weight":
            continue  # tied
        array = tensor.numpy() + (is_gemma and name.endswith("norm.weight"))
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            halves = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    if extra:
        writer.add_tensor(extra, np.ones(head_dim, np.float32))
    _add_rope(writer, config, head_dim)
    kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in metadata.items():  # they win
        kinds[type(value)](name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_TYPES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
}


def _as_converted(tensors):
    """Gate and up of experts apart."""
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), tensor.chunk(2, 1), strict=True):
                yield name.replace("gate_up_proj", f"{part}_proj.weight"), half.contiguous()
        else:
            yield name + (".weight" if name.endswith("experts.down_proj") else ""), tensor


def _add_rope(writer, config, head_dim):
    parameters = config.rope_parameters
    parameters = parameters.get("full_attention", parameters)
    rotated = int(head_dim * parameters.get("partial_rotary_factor", 1))
    writer.add_rope_freq_base(parameters["rope_theta"])
    writer.add_rope_dimension_count(rotated)
    if parameters["rope_type"] == "llama3":
        fields = ("factor", "low_freq_factor", "high_freq_factor")
        original = parameters["original_max_position_embeddings"]
        values = [parameters[field] for field in fields]
        scaled = RopeConfig(parameters["rope_theta"], "llama3", *values, original)
        plain = rotary_frequencies(RopeConfig(parameters["rope_theta"]), head_dim)
        factors = plain / rotary_frequencies(scaled, head_dim)
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    if parameters["rope_type"] in ("yarn", "linear"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(parameters["rope_type"]))
        writer.add_rope_scaling_factor(parameters["factor"])
    if parameters["rope_type"] in ("yarn", "longrope"):
        original = parameters["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
    if parameters["rope_type"] == "longrope":
        factor = config.max_position_embeddings / original
        attention = np.sqrt(1 + np.log(factor) / np.log(original))
        writer.add_rope_scaling_attn_factors(float(attention))
        for length in ("short", "long"):
            values = np.array(parameters[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", values)


GEMMAS = {  # in Hugging Face's config, and in a GGUF file
    "gemma2": (
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    "gemma2 as it is": ({}, {}),
    "gemma3": (
        {
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
            },
        },
        {"rope.freq_base_swa": 700.0},
    ),
}


@pytest.mark.parametrize("name", GEMMAS)
def test_gguf_gemma(tmp_path, name):
    architecture, (overrides, metadata) = name.split()[0], GEMMAS[name]
    common = {"sliding_window": 20, "query_pre_attn_scalar": 16, "head_dim": 16}
    model = save_tiny_model(tmp_path / "hf", architecture, **common, **overrides)
    metadata = {f"{architecture}.{key}": value for key, value in metadata.items()}
    metadata[f"{architecture}.attention.sliding_window"] = 20
    write_gguf(tmp_path / "model.gguf", model, architecture, **metadata)
    logits = logits_of(tmp_path / "model.gguf")
    np.testing.assert_allclose(logits, hf_causal_logits(model), atol=1e-4)


@pytest.mark.parametrize(("architecture", "num_layers"), [("gemma2", 46), ("gemma3", 62)])
def test_gguf_gemma_27b(tmp_path, architecture, num_layers):
    """Scores are scaled by hidden size and heads."""
    sizes = {"hidden_size": 64, "head_dim": 4, "num_hidden_layers": num_layers}
    model = save_tiny_model(tmp_path / "hf", architecture, **sizes)
    window = {f"{architecture}.attention.sliding_window": 20}
    write_gguf(tmp_path / "model.gguf", model, architecture, **window)
    assert open_checkpoint(tmp_path / "model.gguf").config.attention_scale == 16**-0.5


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "llama3-rope", "biases", "yarn", "qwen2", "qwen3", "phi3", "phi3-long"),
        "qwen3-moe",
    ],
)
def test_gguf(tmp_path, name):
    architecture, overrides = MODELS[name]
    if name == "qwen3-moe":  # llama.cpp has experts in all layers
        overrides = {**overrides, "mlp_only_layers": []}
    model = save_tiny_model(tmp_path / "hf", architecture, **overrides)
    write_gguf(tmp_path / "model.gguf", model, architecture.replace("_", ""))
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
        (
            {"architectures": ["MistralForCausalLM"], "attention_bias": True},
            "attention_bias is not supported for MistralForCausalLM",
        ),
        ({"attention_bias": True}, r"the weights lack .*q_proj.bias"),
        ({"num_hidden_layers": None}, "config.json lacks 'num_hidden_layers'"),
        ({"num_key_value_heads": 3}, "4 query heads, which its 3 KV heads do not divide"),
        (
            {"rope_parameters": {"rope_type": "proportional"}},
            "'proportional' is not supported: use one of default, linear, llama3, yarn, longrope",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope parameters for 'full_attention' alone are not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}},
            "rope_theta is 1.0: use more than 1 for yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1, 2]}},
            "short_factor is .1, 2.: use a list of 8 numbers above 0",
        ),
        (
            {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.45},
            "partial_rotary_factor 0.45 rotates 7.2 of a head's 16 elements: use an even number",
        ),
        (
            {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4},
            "a token goes through 8 experts, of which the model has 4",
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
    base = {"architectures": ["LlamaForCausalLM"], **SIZES, "max_position_embeddings": 100}
    old = {**base, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {**base, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert ModelConfig.from_hf(old).rope == ModelConfig.from_hf(new).rope
    assert ModelConfig.from_hf(old).num_kv_heads == 2
