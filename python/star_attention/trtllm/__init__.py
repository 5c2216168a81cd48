"""Engines by TensorRT-LLM's own `trtllm-build`, releases 1.0 to 1.2. See docs/tensorrt_llm.md."""
