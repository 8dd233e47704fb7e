"""Converts checkpoints between the original Hugging Face layout and vl2jax model directories."""
