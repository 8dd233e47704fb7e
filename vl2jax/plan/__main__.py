"""`python -m vl2jax.plan`, see `planning.py`."""

import sys

import jax

from vl2jax.plan import planning

if __name__ == "__main__":
    __doc__ = planning.__doc__  # what --help prints
    jax.config.update("jax_platforms", "cpu")  # the TPU is compiled for, not used
    planning.define_plan_flags()
    raise SystemExit(planning.main(sys.argv))
