"""A small training state to save in a workdir."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vl2jax.training.workdir import Workdir


def state(seed: int, rows: int = 8):
    """Random parameters and optimizer state with bfloat16, float32 and int32 leaves."""
    rng = np.random.default_rng(seed)
    params = {
        "params": {
            "decoder": {
                "moe_1": {
                    "mlp": {"experts": {"up_proj": rng.normal(size=(2, 2, rows, 4))}},
                    "norm": {"scale": rng.normal(size=(2, 4)).astype(ml_dtypes.bfloat16)},
                }
            },
            "image_newline": rng.normal(size=(4,)).astype(ml_dtypes.bfloat16),
        },
        "router": {"decoder": {"moe_1": {"bias": np.float32([[0.1, -0.0]])}}},
    }
    params = jax.tree.map(
        lambda x: jnp.asarray(x, x.dtype if x.itemsize < 8 else "float32"), params
    )
    moments = jax.tree.map(lambda x: x + 1, params["params"])
    return params, ({"mu": moments}, (), [jnp.int32(seed)])


def save_two_steps(path: Path) -> None:
    """Saves the states of the seeds 1 and 2 as steps 1 and 2 of a workdir."""
    with Workdir(path, keep=9, keep_every=None) as workdir:
        for step in (1, 2):
            params, opt_state = state(step)
            workdir.save(step, params=params, opt_state=opt_state, data_state={"next": step})
