"""Llama-family models: their files, weights and tokenizers."""
