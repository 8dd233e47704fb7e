"""Asks a checkpoint about images: `python sample.py --help`.  See vl2jax/programs/sample.py."""

from vl2jax.programs.sample import script

if __name__ == "__main__":
    raise SystemExit(script())
