"""Operations with several implementations: attention, routed experts, KV cache, matrix products.

Each folder is one operation: its `__init__.py` has the function that the model calls,
`reference.py` a plain implementation that tests compare against, and the other files one
implementation per platform.  `registry.py` chooses among them.  No other package asks which
platform a program is compiled for.  Imports `common` and `parallel`.  Start with
`attention/__init__.py`.
"""

from vl2jax.ops import attention, cache, experts, latent_attention, matmul
from vl2jax.ops.platform import compiling_for
from vl2jax.ops.registry import describe_choices, parse, report_choices, use

__all__ = [
    "attention",
    "cache",
    "compiling_for",
    "describe_choices",
    "experts",
    "latent_attention",
    "matmul",
    "parse",
    "report_choices",
    "use",
]
