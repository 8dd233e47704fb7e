"""XLA compiler options for each platform."""

import jax.numpy as jnp

from vl2jax.ops.platform import platform


def compiler_options(dtype: jnp.dtype, backend: str | None = None) -> dict[str, str] | None:
    """XLA options for a program that computes in `dtype`.

    CPU: by default, XLA hoists the conversion of stacked bfloat16 weights to float32, and of what a
    scan saves for its backward pass, out of the loop over layers.  That is slower and needs a
    float32 copy of all of them in memory.

    TPU: by default, XLA splits some matrix products with sharded weights into one step per shard
    ("windowed einsum").  With our sizes each step writes the activations again (2.8 times the
    memory traffic in the vision tower), and compilation takes long.

    Args:
      dtype: dtype of the computation.
      backend: "cpu", "gpu" or "tpu"; None: `platform()`.

    Returns:
      Options for `jax.jit(compiler_options=...)`; None: the defaults.
    """
    backend = backend or platform()
    if backend == "cpu" and dtype == jnp.bfloat16:
        return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    if backend == "tpu":
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    return None


def run_once_options() -> dict[str, int] | None:
    """XLA options for a program that runs only once: low optimization on CPU, else the defaults.

    The random initialization of a whole model takes three times as long to compile with the
    defaults and does not run faster.

    Returns:
      Options for `jax.jit(compiler_options=...)`; None: the defaults.
    """
    return {"xla_backend_optimization_level": 1} if platform() == "cpu" else None
