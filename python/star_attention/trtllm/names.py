"""Every name that Star Attention uses of TensorRT-LLM and of TensorRT's Python API: where it is,
how it is called, and the first release that had it so. `tests/python/test_trtllm_names.py` compares
this with the code and, where TensorRT-LLM is installed, with TensorRT-LLM.

Checked against its public source: tags v0.5.0 to v0.9.0, the main branch at 0.12, 0.16, and the
files of 1.0 to 1.2 that docs/tensorrt_llm.md lists.
"""

from __future__ import annotations

# Module -> name -> the arguments that are passed, and since when.
NAMES: dict[str, dict[str, tuple[str, str]]] = {
    "tensorrt_llm": {"__version__": ("", "0.5")},
    "tensorrt_llm._common": {
        "default_net": ("()", "0.5"),
        "default_trtnet": ("()", "0.5"),
    },
    "tensorrt_llm.functional": {
        "Tensor": ("(name, dtype, shape, dim_range)", "0.5"),
        "_create_tensor": ("(trt_tensor, producer)", "0.5"),
        "index_select": ("(input, dim, index)", "0.5"),
    },
    "tensorrt_llm.layers": {"KeyValueCacheParams": ("()", "0.5")},
    "tensorrt_llm.models": {
        "LLaMAForCausalLM": ("(config)", "0.8"),
        "QWenForCausalLM": ("(config)", "0.9"),
    },
    "tensorrt_llm.module": {"Module": ("()", "0.5")},
    "tensorrt_llm.runtime": {"Session": ("()", "0.5")},
}

# Owner -> attributes of its instances that are used, overridden or called by trtllm-build.
MEMBERS: dict[str, tuple[str, ...]] = {
    "tensorrt_llm.functional.Tensor": ("trt_tensor", "mark_output"),
    "tensorrt_llm.network.Network": ("plugin_config",),
    "tensorrt_llm.models.modeling_utils.PretrainedConfig": ("to_dict", "logits_dtype"),
    "tensorrt_llm.models.modeling_utils.DecoderModelForCausalLM": (
        *("config", "transformer", "lm_head", "forward", "prepare_inputs"),
    ),
    "tensorrt_llm.models.llama.model.LLaMAModel": ("layers", "forward"),
    "tensorrt_llm.models.qwen.model.QWenModel": ("layers", "forward"),
    "tensorrt_llm.models.llama.model.LLaMADecoderLayer": ("attention",),
    "tensorrt_llm.models.qwen.model.QWenDecoderLayer": ("attention",),
    "tensorrt_llm.layers.Attention": ("qkv", "dense", "forward"),
    "tensorrt_llm.runtime.Session": ("from_serialized_engine", "set_shapes", "run"),
    "tensorrt": (
        *("__version__", "get_plugin_registry", "int32", "float32"),
        *("PluginField", "PluginFieldType", "INT32", "PluginFieldCollection"),
        *("TensorRTPhase", "BUILD"),
    ),
    "tensorrt.IPluginRegistry": ("get_creator", "load_library"),
    "tensorrt.IPluginCreatorV3One": ("create_plugin",),
    "tensorrt.INetworkDefinition": ("add_plugin_v3",),
    "tensorrt.ILayer": ("get_output",),
}
