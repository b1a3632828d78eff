"""Outputs of diffusion models."""
