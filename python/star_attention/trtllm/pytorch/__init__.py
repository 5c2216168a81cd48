"""Star Attention in TensorRT-LLM's PyTorch backend (`trtllm-serve`, `LLM`), from release 1.3 on.
`import star_attention.trtllm.pytorch.model` registers the models. See docs/tensorrt_llm.md."""
