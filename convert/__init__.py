"""Conversion between the original Hugging Face layout and vl2jax checkpoint directories."""
