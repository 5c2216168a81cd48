"""Model folders for benchmarks of servers: a shape, a tokenizer, and weights if they are small."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving_client import LETTERS

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 1 << 20,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}
SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def make_model(name: str, folder: Path) -> None:
    """A folder with config and tokenizer; `tiny` has random weights too, `8b`, in Llama-3.1-8B's
    shape but for more positions, has none (--load-format dummy)."""
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder, shape["vocab_size"])
    ends = shape["vocab_size"] - 1
    config = {
        **shape,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": shape["vocab_size"] - len(SPECIAL),
        "eos_token_id": ends,
        "torch_dtype": "float32" if name == "tiny" else "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if name == "tiny":
        save_weights(folder, shape)


def save_weights(folder: Path, shape: dict[str, Any]) -> None:
    """Large random ones, so that what is likeliest is so by far."""
    import torch
    from safetensors.torch import save_file

    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    generator = torch.Generator().manual_seed(0)

    def random_of(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * 0.2

    tensors = {
        "model.embed_tokens.weight": random_of(shape["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": random_of(shape["vocab_size"], hidden),
    }
    for layer in range(shape["num_hidden_layers"]):
        tensors |= {
            f"model.layers.{layer}.{part}.weight": weight
            for part, weight in {
                "input_layernorm": torch.ones(hidden),
                "post_attention_layernorm": torch.ones(hidden),
                "self_attn.q_proj": random_of(heads * shape["head_dim"], hidden),
                "self_attn.k_proj": random_of(kv_heads * shape["head_dim"], hidden),
                "self_attn.v_proj": random_of(kv_heads * shape["head_dim"], hidden),
                "self_attn.o_proj": random_of(hidden, heads * shape["head_dim"]),
                "mlp.gate_proj": random_of(inner, hidden),
                "mlp.up_proj": random_of(inner, hidden),
                "mlp.down_proj": random_of(hidden, inner),
            }.items()
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE of exactly `size` tokens, with Llama 3's template: pairs of letters, with
    and without a space in front, and, if there is room, words of four letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocab = {
        token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    merges: list[tuple[str, str]] = []
    pairs = [first + second for first in LETTERS for second in LETTERS]
    random.Random(0).shuffle(pairs)

    def candidates() -> Iterator[tuple[str, str]]:
        yield from (tuple(pair) for pair in pairs)
        yield from (("\u0120", pair) for pair in pairs)
        for first in pairs:
            yield from ((f"\u0120{first}", second) for second in pairs)

    for left, right in candidates():
        if len(vocab) == size - len(SPECIAL):
            break
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    fast = Tokenizer(BPE(vocab, merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    assert fast.get_vocab_size() == size
    fast.save(str(folder / "tokenizer.json"))
    # As every version of transformers reads it.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[-1],
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
