"""A run or an answer compiled for devices that are not there: memory, work, traffic, a roofline.

`python -m vl2jax.plan` is its command line.  Imports everything.  Start with `planning.py`;
`hlo.py` counts what a compiled program does.
"""
