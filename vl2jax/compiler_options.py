"""Options of XLA that a platform needs."""

import jax
import jax.numpy as jnp


def compiler_options(dtype: jnp.dtype, backend: str | None = None) -> dict[str, str] | None:
    """For `jax.jit` of a program that computes in `dtype`; None where the defaults are right.

    XLA's CPU compiler would convert stacked bfloat16 weights, and what a scan saves for its
    backward pass, to float32 ahead of the loop over layers: slower, and all of them once more in
    memory.

    Args:
      backend: "cpu", "gpu" or "tpu"; None: the default one.
    """
    if (backend or jax.default_backend()) == "cpu" and dtype == jnp.bfloat16:
        return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    return None
