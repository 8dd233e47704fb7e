"""`python -m vl2jax.plan` and `vl2jax-plan`, see `planning.py`."""

import sys

import jax

from vl2jax.plan import planning


def script() -> int:
    """Runs the planner with the command line of this process."""
    jax.config.update("jax_platforms", "cpu")  # the TPU is compiled for, not used
    planning.define_plan_flags()
    return planning.main(sys.argv)


if __name__ == "__main__":
    raise SystemExit(script())
