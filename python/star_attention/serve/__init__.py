"""The server: an OpenAI-compatible front over a job of ranks. See docs/serving.md."""
