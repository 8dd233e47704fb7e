"""Scores a checkpoint: `python eval.py --help`.  See vl2jax/programs/eval.py."""

from vl2jax.programs.eval import script

if __name__ == "__main__":
    raise SystemExit(script())
