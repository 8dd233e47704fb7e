"""Options of XLA that a platform needs."""

import jax.numpy as jnp

from vl2jax.ops.platform import platform


def compiler_options(dtype: jnp.dtype, backend: str | None = None) -> dict[str, str] | None:
    """For a program that computes in `dtype`; None where the defaults are right.

    XLA's CPU compiler would convert stacked bfloat16 weights, and what a scan saves for its
    backward pass, to float32 ahead of the loop over layers: slower, and all of them once more in
    memory.  Its TPU compiler would split some products with sharded weights into steps, one for
    each part of the weight as it arrives; with our sizes that writes the activations again and
    again (2.8 times the traffic in the vision tower) and compiles for long.

    Args:
      backend: "cpu", "gpu" or "tpu"; None: the default one.
    """
    backend = backend or platform()
    if backend == "cpu" and dtype == jnp.bfloat16:
        return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    if backend == "tpu":
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    return None


def options_to_run_once() -> dict[str, int] | None:
    """For a program that runs once: on CPU machine code is optimised only a little.

    That of the random numbers of a whole model takes three times as long to compile otherwise, and
    is not faster.
    """
    return {"xla_backend_optimization_level": 1} if platform() == "cpu" else None
