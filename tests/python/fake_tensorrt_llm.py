"""Stands for `tensorrt` and `tensorrt_llm`: as much as star_attention/trtllm/names.py lists, with
those signatures. It builds no network: a tensor holds a torch tensor and every layer computes, the
plugin with the CPU operators, so that the model class can be held to the torch engine's logits."""

import contextlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch
from torch.nn import functional as F

from star_attention.ops import reference

POOLS = {}  # layer -> KV pool, of the step that is computed
_net = SimpleNamespace(inputs={}, outputs={}, plugin_config=None)


class Module:
    def __init__(self):
        pass

    def __call__(self, *arguments, **options):
        return self.forward(*arguments, **options)


class Tensor:
    def __init__(self, name=None, dtype=None, shape=None, dim_range=None, trt_tensor=None):
        self.name, self.dtype, self.shape, self.dim_range = name, dtype, shape, dim_range
        self.trt_tensor = trt_tensor
        if trt_tensor is None:
            _net.inputs[name] = self

    def mark_output(self, name=None, dtype=None):
        _net.outputs[name] = (self.trt_tensor, dtype)


def _create_tensor(trt_tensor, producer):
    assert producer is not None
    return Tensor(trt_tensor=trt_tensor)


def index_select(input, dim, index):
    return Tensor(trt_tensor=input.trt_tensor.index_select(dim, index.trt_tensor.long()))


class KeyValueCacheParams:
    past_key_value = None

    def fill_none_tensor_list(self, list_size):
        self.past_key_value = (None,) * list_size


class Linear(Module):
    def __init__(self, weight, bias=None):
        self.weight, self.bias = weight, bias

    def forward(self, x, lora_runtime_params=None, lora_hidden_state=None, **_):
        return Tensor(trt_tensor=F.linear(x.trt_tensor, self.weight, self.bias))


class DecoderLayer(Module):
    def __init__(self, weights, index, eps):
        self.weights, self.eps, self.prefix = weights, eps, f"model.layers.{index}."
        parts = [self.prefix + f"self_attn.{name}_proj." for name in "qkv"]
        biases = [weights[part + "bias"] for part in parts if part + "bias" in weights]
        self.attention = SimpleNamespace(
            qkv=Linear(
                torch.cat([weights[part + "weight"] for part in parts]),
                torch.cat(biases) if biases else None,
            ),
            dense=Linear(weights[self.prefix + "self_attn.o_proj.weight"]),
        )

    def forward(self, hidden_states, use_cache, attention_mask, kv_cache_params, attention_params):
        x = hidden_states.trt_tensor
        attended = self.attention(
            Tensor(trt_tensor=self.norm(x, "input_layernorm")),
            attention_mask=attention_mask,
            use_cache=use_cache,
            spec_decoding_params=None,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
            lora_layer_params=None,
        )
        x = x + attended.trt_tensor
        h = self.norm(x, "post_attention_layernorm")
        gate, up, down = (
            self.weights[f"{self.prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        return Tensor(trt_tensor=x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down))

    def norm(self, x, name):
        weight = self.weights[f"{self.prefix}{name}.weight"]
        return F.rms_norm(x, weight.shape, weight, self.eps)


class Decoder(Module):
    def __init__(self, weights, num_layers, eps):
        self.weights, self.eps = weights, eps
        self.layers = [DecoderLayer(weights, index, eps) for index in range(num_layers)]

    def forward(
        self,
        input_ids,
        position_ids=None,
        use_cache=False,
        attention_mask=None,
        kv_cache_params=None,
        attention_params=None,
    ):
        assert not use_cache
        kv_cache_params.fill_none_tensor_list(len(self.layers))
        x = Tensor(
            trt_tensor=F.embedding(input_ids.trt_tensor, self.weights["model.embed_tokens.weight"])
        )
        for layer in self.layers:
            x = layer(x, use_cache, attention_mask, kv_cache_params, attention_params)
        norm = self.weights["model.norm.weight"]
        return Tensor(trt_tensor=F.rms_norm(x.trt_tensor, norm.shape, norm, self.eps))


class PretrainedConfig(SimpleNamespace):
    """`weights` stands for a checkpoint: Hugging Face names -> float32 tensors."""

    def to_dict(self):
        return {name: value for name, value in vars(self).items() if name != "weights"}


class LLaMAForCausalLM(Module):
    def __init__(self, config):
        self.config = config
        weights = config.weights
        self.transformer = Decoder(weights, config.num_hidden_layers, config.norm_epsilon)
        self.lm_head = Linear(weights.get("lm_head.weight", weights["model.embed_tokens.weight"]))


class QWenForCausalLM(LLaMAForCausalLM):
    pass


class Plugin:
    """The plugin's contract: the order of its inputs, the names of its attributes."""

    def __init__(self, name, collection, phase):
        assert (name, phase) == ("StarAttention", "build")
        self.fields = {field.name: int(field.data[0]) for field in collection}
        assert list(self.fields) == ["layer", "num_q_heads", "num_kv_heads", "head_dim"]

    def compute(self, qkv, positions, starts, kv_lens, table, slots, rotary, context):
        assert context.shape == (2,)
        pool, head_dim = POOLS[self.fields["layer"]], self.fields["head_dim"]
        q = qkv.new_empty(len(qkv), self.fields["num_q_heads"], head_dim)
        reference.rope_append(qkv, positions, rotary, pool, slots, q)
        options = {"scale": head_dim**-0.5, "max_q_len": 0, "max_kv_len": 0}
        o, _ = reference.paged_attention(q, pool, table, starts, kv_lens, causal=True, **options)
        return o.flatten(1)


class Layer:
    def __init__(self, output):
        self.output = output

    def get_output(self, index):
        return self.output


def install(monkeypatch, version="1.2.0"):
    """Puts the modules where `import` finds them. Returns the network that is built."""
    registry = SimpleNamespace(
        load_library=lambda path: None,
        get_creator=lambda name, version, namespace: (
            SimpleNamespace(create_plugin=Plugin)
            if (name, version, namespace) == ("StarAttention", "1", "")
            else None
        ),
    )
    trt = ModuleType("tensorrt")
    trt.__version__ = "10.14.1.48"
    trt.int32, trt.float32 = torch.int32, torch.float32
    trt.get_plugin_registry = lambda: registry
    trt.PluginFieldType = SimpleNamespace(INT32=torch.int32)
    trt.PluginField = lambda name, data, type: SimpleNamespace(name=name, data=data, type=type)
    trt.PluginFieldCollection = list
    trt.TensorRTPhase = SimpleNamespace(BUILD="build")
    network = SimpleNamespace(
        add_plugin_v3=lambda inputs, _, plugin: Layer(plugin.compute(*inputs)),
    )
    _net.inputs, _net.outputs = {}, {}
    _net.plugin_config = SimpleNamespace(
        remove_input_padding=True,
        paged_kv_cache=True,
        lora_plugin=None,
        streamingllm=False,
        norm_quant_fusion=False,
        manage_weights=False,
        tokens_per_block=64,
    )
    package = {
        "": {"__version__": version},
        "._common": {"default_net": lambda: _net, "default_trtnet": lambda: network},
        ".functional": {
            "Tensor": Tensor,
            "_create_tensor": _create_tensor,
            "index_select": index_select,
        },
        ".layers": {"KeyValueCacheParams": KeyValueCacheParams},
        ".models": {"LLaMAForCausalLM": LLaMAForCausalLM, "QWenForCausalLM": QWenForCausalLM},
        ".module": {"Module": Module},
        ".runtime": {"Session": None},
    }
    modules = [trt]
    for suffix, names in package.items():
        module = ModuleType("tensorrt_llm" + suffix)
        vars(module).update(names)
        modules.append(module)
    for module in modules:
        module.__spec__ = ModuleSpec(module.__name__, None)  # torch looks for tensorrt's
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return _net


@contextlib.contextmanager
def pools(config, num_pages, page):
    shape = (num_pages, 2, config.num_kv_heads, page, config.head_dim)
    POOLS.update({layer: torch.zeros(shape) for layer in range(config.num_layers)})
    yield
    POOLS.clear()
