"""The command line, `star-attn`."""
