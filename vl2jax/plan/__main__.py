"""`python -m vl2jax.plan`."""

import sys

import jax

from vl2jax.plan.planning import define_plan_flags, main

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # programs are compiled for TPU, not run
    define_plan_flags()
    raise SystemExit(main(sys.argv))
