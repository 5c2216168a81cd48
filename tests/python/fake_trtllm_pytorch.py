"""Stands for TensorRT-LLM's PyTorch backend: as much as
star_attention/trtllm/pytorch/names.py lists, with those signatures, and what its engine does around
a model: pages by block numbers, a batch of prompts and generated tokens, the same on all ranks.
Models compute with Hugging Face's weights."""

import sys
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Generic, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from star_attention.models.config import ModelConfig as StarModelConfig
from star_attention.models.rotary import rotary_table


class Mapping:
    def __init__(
        self, world_size=1, rank=0, gpus_per_node=8, *, cp_size=1, tp_size=1, pp_size=1, **kwargs
    ):
        assert world_size == tp_size * pp_size * cp_size
        self.rank, self.tp_size, self.pp_size, self.cp_size = rank, tp_size, pp_size, cp_size
        self.tp_rank = rank % tp_size
        self.enable_attention_dp = kwargs.get("enable_attention_dp", False)


@dataclass
class KVCacheParams:
    use_cache: bool
    num_cached_tokens_per_seq: list


class PredefinedAttentionMask(str, Enum):
    CAUSAL = "causal"
    FULL = "full"


@dataclass(kw_only=True)
class AttentionForwardArgs:
    output: torch.Tensor | None = None
    attention_mask: PredefinedAttentionMask = PredefinedAttentionMask.CAUSAL
    attention_window_size: int | None = None
    attention_mask_data: torch.Tensor | None = None
    attention_sinks: torch.Tensor | None = None
    relative_attention_bias: torch.Tensor | None = None
    cross_kv: torch.Tensor | None = None
    mrope_rotary_cos_sin: torch.Tensor | None = None


@dataclass
class AttentionRuntimeFeatures:
    chunked_prefill: bool = False
    cache_reuse: bool = False


@dataclass(kw_only=True)
class AttentionMetadata:
    max_num_requests: int
    max_num_tokens: int
    max_num_sequences: int | None = None
    kv_cache_manager: object = None
    mapping: Mapping | None = None
    is_cuda_graph: bool = field(default=False, repr=False)
    seq_lens: torch.Tensor | None
    num_contexts: int
    kv_cache_params: KVCacheParams | None = None
    request_ids: list | None = None
    prompt_lens: list | None = None
    runtime_features: AttentionRuntimeFeatures = field(default_factory=AttentionRuntimeFeatures)

    @property
    def num_tokens(self):
        return int(self.seq_lens.sum())

    def prepare(self):
        pass


TMetadata = TypeVar("TMetadata", bound=AttentionMetadata)


class AttentionBackend(Generic[TMetadata]):
    Metadata = AttentionMetadata

    def __init__(
        self, layer_idx, num_heads, head_dim, num_kv_heads=None, quant_config=None, **kwargs
    ):
        self.layer_idx, self.num_heads, self.head_dim = layer_idx, num_heads, head_dim
        self.num_kv_heads = num_kv_heads or num_heads
        self.quant_config = quant_config

    def update_quant_config(self, new_quant_config):
        self.quant_config = new_quant_config

    def forward(self, q, k, v, metadata, forward_args=None, **kwargs):
        raise NotImplementedError


class Attention(nn.Module):
    """RoPE in front of the backend, as with one that does not fuse it."""

    def __init__(self, config, star, weights, layer_idx):
        super().__init__()
        assert config.mapping.tp_size == 1
        assert config.attn_backend == "VANILLA"
        self.layer_idx, self.num_heads, self.head_dim = layer_idx, star.num_q_heads, star.head_dim
        self.num_key_value_heads, self.quant_config = star.num_kv_heads, None
        self.q_scaling = 1.0
        parts = [f"model.layers.{layer_idx}.self_attn.{each}_proj." for each in "qkv"]
        self.qkv = torch.cat([weights[part + "weight"] for part in parts])
        biases = [weights[part + "bias"] for part in parts if part + "bias" in weights]
        self.bias = torch.cat(biases) if biases else None
        self.o = weights[f"model.layers.{layer_idx}.self_attn.o_proj.weight"]
        norms = [f"model.layers.{layer_idx}.self_attn.{each}_norm.weight" for each in "qk"]
        self.norms, self.eps = [weights.get(name) for name in norms], star.rms_norm_eps
        self.rotary = rotary_table(star.rope, star.head_dim, 4096, self.qkv.device)
        self.attn = AttentionBackend(
            layer_idx, self.num_heads, self.head_dim, self.num_key_value_heads
        )

    def forward(self, position_ids, hidden_states, attn_metadata):
        heads = F.linear(hidden_states, self.qkv, self.bias).unflatten(1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, *[self.num_key_value_heads] * 2], dim=1)
        q, k = (self.rotated(x, n, position_ids) for x, n in zip((q, k), self.norms, strict=True))
        q, k, v = (x.flatten(1)[: attn_metadata.num_tokens] for x in (q, k, v))
        output = self.attn.forward(q, k, v, attn_metadata, forward_args=AttentionForwardArgs())
        return F.linear(output, self.o)

    def rotated(self, x, norm, position_ids):
        if norm is not None:
            x = rms_norm(x, norm, self.eps)
        cos, sin = self.rotary[position_ids[0].long(), None].chunk(2, dim=-1)
        first, second = x.float().chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(x.dtype)


def rms_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


class DecoderModelForCausalLM(nn.Module):
    def __init__(self, model_config):
        super().__init__()
        self.model_config = model_config
        star, weights = model_config.pretrained_config, model_config.weights
        self.weights, self.eps = weights, star.rms_norm_eps
        layers = range(star.num_layers)
        self.attention = nn.ModuleList(
            Attention(model_config, star, weights, index) for index in layers
        )

    def forward(
        self,
        attn_metadata,
        input_ids=None,
        position_ids=None,
        inputs_embeds=None,
        return_context_logits=False,
        **kwargs,
    ):
        weights = self.weights
        x = weights["model.embed_tokens.weight"][input_ids.long()]
        for index, attention in enumerate(self.attention):
            prefix = f"model.layers.{index}."
            normed = rms_norm(x, weights[prefix + "input_layernorm.weight"], self.eps)
            x = x + attention(position_ids, normed, attn_metadata)
            normed = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], self.eps)
            gate, up, down = (
                weights[f"{prefix}mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
            )
            x = x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)
        x = rms_norm(x, weights["model.norm.weight"], self.eps)
        last = attn_metadata.seq_lens.cumsum(0).to(x.device) - 1
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        return F.linear(x[last], head).float()


class LlamaForCausalLM(DecoderModelForCausalLM):
    pass


class Qwen2ForCausalLM(DecoderModelForCausalLM):
    pass


class Qwen3ForCausalLM(DecoderModelForCausalLM):
    pass


class ModelConfig:
    """Frozen once it is made, but for `_frozen`."""

    _frozen = False

    def __init__(self, hf_config, weights, mapping):
        self.mapping, self.attn_backend = mapping, "TRTLLM"
        self.pretrained_config = StarModelConfig.from_hf(hf_config.to_dict())
        self.weights = weights
        self._frozen = True

    def __setattr__(self, name, value):
        if self._frozen and name != "_frozen":
            raise AttributeError(f"Cannot modify ModelConfig.'{name}' - instance is frozen")
        super().__setattr__(name, value)


class KVCacheManager:
    """A rank's pages: all layers of a block lie together. Unused memory is NaN."""

    def __init__(self, star, mapping, tokens_per_block, num_blocks, blocks, **like):
        self.tokens_per_block = tokens_per_block
        heads = -(-star.num_kv_heads // mapping.tp_size)
        self.shape = 2, tokens_per_block, heads, star.head_dim
        self.primary = torch.full((num_blocks, star.num_layers, *self.shape), torch.nan, **like)
        self.blocks = blocks  # request id -> block numbers, the same on all ranks

    def get_buffers(self, layer_idx, kv_layout="NHD"):
        assert kv_layout == "NHD"
        return self.primary[:, layer_idx]

    def get_batch_cache_indices(self, request_ids, layer_idx=None):
        return [list(self.blocks[request]) for request in request_ids]


def register_auto_model(name):
    def register(cls):
        MODEL_CLASS_MAPPING[name] = cls
        return cls

    return register


MODEL_CLASS_MAPPING = {}


def mpi_comm():
    raise AssertionError("no MPI here")


MODULES = {
    "_torch.attention.attention": (Attention,),
    "_torch.attention.backends.interface": (
        AttentionBackend,
        AttentionForwardArgs,
        AttentionMetadata,
        AttentionRuntimeFeatures,
        PredefinedAttentionMask,
    ),
    "_torch.metadata": (KVCacheParams,),
    "_torch.model_config": (ModelConfig,),
    "_torch.models.modeling_llama": (LlamaForCausalLM,),
    "_torch.models.modeling_qwen": (Qwen2ForCausalLM,),
    "_torch.models.modeling_qwen3": (Qwen3ForCausalLM,),
    "_torch.models.modeling_utils": (DecoderModelForCausalLM, register_auto_model),
    "_torch.pyexecutor.resource_manager": (KVCacheManager,),
    "_utils": (mpi_comm,),
    "mapping": (Mapping,),
}


def install(monkeypatch):
    """Puts the modules where `import` finds them."""
    for name, contents in MODULES.items():
        module = ModuleType(f"tensorrt_llm.{name}")
        vars(module).update({each.__name__: each for each in contents})
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parent = module.__name__.rpartition(".")[0]
        while parent:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
            parent = parent.rpartition(".")[0]


class Engine:
    """What TensorRT-LLM's executor does on one rank, for the requests that a test schedules."""

    def __init__(self, cls, hf_model, mapping, tokens_per_block, num_blocks, blocks, **like):
        """`like`: device and dtype."""
        weights = {name: value.detach().to(**like) for name, value in hf_model.state_dict().items()}
        self.model = cls(ModelConfig(hf_model.config, weights, mapping))
        self.manager = KVCacheManager(
            self.model.model_config.pretrained_config,
            mapping,
            tokens_per_block,
            num_blocks,
            blocks,
            **like,
        )
        self.device = self.manager.primary.device
        self.lengths = {}

    def step(self, prompts, generated, **metadata):
        """Logits [S, V] after reading prompts, as far as they are not cached, and one token of each
        other request; both are {request id: tokens}."""
        batch = {**prompts, **{request: [token] for request, token in generated.items()}}
        cached = [self.lengths.get(request, 0) for request in batch]
        lengths = [len(tokens) for tokens in batch.values()]
        places = [torch.arange(c, c + n) for c, n in zip(cached, lengths, strict=True)]
        options = {
            "max_num_requests": 8,
            "max_num_tokens": 8192,
            "kv_cache_manager": self.manager,
            "seq_lens": torch.tensor(lengths, dtype=torch.int),
            "num_contexts": len(prompts),
            "request_ids": list(batch),
            "kv_cache_params": KVCacheParams(True, cached),
            **metadata,
        }
        logits = self.model.forward(
            attn_metadata=AttentionMetadata(**options),
            input_ids=torch.cat([torch.as_tensor(t) for t in batch.values()]).int().to(self.device),
            position_ids=torch.cat(places).int()[None].to(self.device),
            inputs_embeds=None,
            multimodal_params=[],
            resource_manager=SimpleNamespace(),
        )
        for request, count, before in zip(batch, lengths, cached, strict=True):
            self.lengths[request] = before + count
        return logits
