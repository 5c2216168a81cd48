"""Engines run a model's forward passes on one rank."""
