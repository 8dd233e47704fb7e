"""Trains DeepSeek-VL2: `python train.py --help`.  See vl2jax/programs/train.py."""

from vl2jax.programs.train import script

if __name__ == "__main__":
    raise SystemExit(script())
