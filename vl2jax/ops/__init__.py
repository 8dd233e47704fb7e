"""Operations with more than one implementation: attention, experts, caches, products with weights.

Each folder is one operation: the function that the model calls, a plain reference, and a file per
platform.  `registry.py` chooses; this is the only place that asks which platform a program is for.
Imports `common` and `parallel`.  Start with `attention/__init__.py`.
"""

from vl2jax.ops import attention, cache, experts, latent_attention, matmul
from vl2jax.ops.platform import compiling_for
from vl2jax.ops.registry import describe, parse, tell, use

__all__ = [
    "attention",
    "cache",
    "compiling_for",
    "describe",
    "experts",
    "latent_attention",
    "matmul",
    "parse",
    "tell",
    "use",
]
