"""What several test modules use."""

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from star_attention.distributed.launch import mpirun_command
from star_attention.runtime.orders import Ask, Decode, QuestionPart, Release
from star_attention.runtime.placement import keeper
from star_attention.runtime.sampling import to_numpy

HERE = Path(__file__).parent

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
# Of a head of 16 elements, of which 12 are rotated.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
}
# Every supported kind of model by a name: its architecture and what differs from the tiny model.
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "yarn": ("llama", {"rope_parameters": YARN_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "ministral": ("ministral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-moe": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3-long": (
        "phi3",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 128},
    ),
}

_MIXED = ["full_attention", "sliding_attention", "full_attention"]
# Likewise, those with windows: within a page of 8 tokens, across blocks of 32, and longer.
WINDOWED_MODELS = {
    "all layers": ("mistral", {"sliding_window": 20}),
    "by layer": ("ministral", {"sliding_window": 5, "head_dim": 16, "layer_types": _MIXED}),
    "in later layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 45, "max_window_layers": 1},
    ),
    "fused": ("phi3", {"sliding_window": 33}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "sliding_window": 37,
            "query_pre_attn_scalar": 24,
            "layer_types": _MIXED,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
}

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<s>", "<|user|>", "<|assistant|>", "<|end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\nWhat did it do?\n",
    "It's 12345 o'clock!\n  Indented text, and more.\n...\n",
    "\u00fcber na\u00efve caf\u00e9s \u4f60\u597d \u4e16\u754c \U0001f600\n",
] * 50


def load_script(name):
    """scripts/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE.parents[1] / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def run_job(num_ranks, *command, timeout=300, check=True, launcher=None, **environment):
    """Runs a Python command as ranks, by mpirun or another launcher; the whole process group ends
    with it."""
    if launcher is None:
        launcher = mpirun_command(num_ranks, oversubscribe=True) if num_ranks > 1 else []
    process = subprocess.Popen(
        [*launcher, sys.executable, *map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if check:
        assert process.returncode == 0, f"exit code {process.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def block_mask(total, context_len, block_size, anchor_size):
    """bool [total, total]: who sees whom, from the definition in docs/architecture.md."""
    i, j = np.arange(total)[:, None], np.arange(total)[None]
    same_block = i // block_size == j // block_size
    return (j <= i) & ((i >= context_len) | same_block | (j < anchor_size))


# Whose Hugging Face classes take one mask for all layers, and one for each kind of layer.
_WINDOWS = ("mistral", "phi3", "qwen3_moe")
_WINDOWS_BY_LAYER = ("ministral", "qwen2", "qwen3", "gemma2", "gemma3_text")


def hf_logits(model, tokens, mask):
    """float32 [total, vocab] of a Hugging Face model under a mask, bool [total, total]; layers with
    a window see that instead."""

    def bias(mask):
        zeros = torch.zeros(mask.shape, dtype=model.dtype)
        return zeros.masked_fill_(~torch.from_numpy(mask), torch.finfo(model.dtype).min)[None, None]

    masks = bias(mask)
    size, kind = getattr(model.config, "sliding_window", None), model.config.model_type
    if size is not None and kind in (*_WINDOWS, *_WINDOWS_BY_LAYER):
        i, j = np.ogrid[: len(tokens), : len(tokens)]
        window = bias((j <= i) & (j > i - size))
        by_layer = {"full_attention": masks, "sliding_attention": window}
        masks = window if kind in _WINDOWS else by_layer
    with torch.inference_mode():
        ids = torch.from_numpy(tokens).long()[None]
        return model(input_ids=ids, attention_mask=masks).logits[0].float().numpy()


def run_all(leader):
    """Steps until nothing is left to do; the tokens by question."""
    tokens = {}
    while (new := leader.step()) is not None:
        for each in new:
            tokens.setdefault(each.question, []).append(each.token)
    return tokens


def forced_logits(leader, context, question, answer, placement="tail"):
    """Logits of every question and answer token, as if the answer had been generated."""
    number, ranks, page = 10**6, context.plan.num_ranks, context.plan.tokens_per_block
    part = QuestionPart(number, context.number, question, ranks - 1, all_rows=True)
    rows = [to_numpy(leader.execute(Ask((part,)))).copy()]
    for index, token in enumerate(answer):
        order = Decode((number,), (int(token),), (keeper(placement, index, ranks, page),))
        rows.append(to_numpy(leader.execute(order)).copy())
    leader.execute(Release(questions=(number,)))
    return np.concatenate(rows)


# What the classes of some architectures do not share.
_ONLY = {
    "phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gemma2": {"head_dim": 16},
    "gemma3": {"head_dim": 16},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
}


def save_tiny_model(folder, architecture="llama", dtype=torch.float32, shards=False, **overrides):
    """A random model of two KV heads in a Hugging Face folder; returns the HF model."""
    import transformers

    torch.manual_seed(0)
    options = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "attn_implementation": "eager",
        **_ONLY.get(architecture, {}),
        **overrides,
    }
    name = "".join(map(str.capitalize, architecture.split("_")))
    text = "Text" if architecture == "gemma3" else ""  # not that of texts and images
    config = getattr(transformers, f"{name}{text}Config")(**copy.deepcopy(options))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter)
        elif architecture.startswith("gemma") and parameter_name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
        parameter.data = parameter.data.to(dtype)  # not the rotary frequencies
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    return model


def train_tokenizer(folder, kind):
    """A small tokenizer of a family: Llama 3's byte-level BPE, or Llama 2's with byte fallback."""
    from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    if kind == "llama3":
        fast = Fast(BPE())
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        fast.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet)
    else:
        fast = Fast(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        fast.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        fast.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special)
    corpus = CORPUS if kind == "llama3" else [line for text in CORPUS for line in text.split("\n")]
    fast.train_from_iterator(corpus, trainer)
    fast.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="<|end|>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    return folder


def run_oracle_job(folder, num_ranks, model, tokens, num_question, cases, **engine_options):
    """The logits of `oracle_job.py`: {(case index, placement): [2 * num_question, vocab]}."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "tokens.npy", tokens)
    (folder / "cases.json").write_text(json.dumps(cases))
    output = folder / "logits.npz"
    job = (HERE / "oracle_job.py", model, folder / "tokens.npy", num_question)
    run_job(num_ranks, *job, folder / "cases.json", output, json.dumps(engine_options))
    results = np.load(output)
    return {(int(key.split()[0]), key.split()[1]): results[key] for key in results.files}


def install_package(folder, distribution, files):
    """Lays a distribution out in `folder` as pip does; importing any of its folders fails.

    Args:
        files: path within `folder` -> text.
    """
    guards = {f"{Path(path).parts[0]}/__init__.py": "raise ImportError" for path in files}
    info = f"{distribution.replace('-', '_')}-1.0.dist-info"
    metadata = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"}
    record = "".join(f"{path},,\n" for path in (*files, *guards, *metadata))
    for path, text in {**files, **guards, **metadata, f"{info}/RECORD": record}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, "utf-8")
