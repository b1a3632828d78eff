"""Outputs of language models."""
