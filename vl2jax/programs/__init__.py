"""The programs: `train.py`, `sample.py` and `eval.py`, installed as `vl2jax-train` and so on.

Imports everything.  Start with `train.py`.
"""
