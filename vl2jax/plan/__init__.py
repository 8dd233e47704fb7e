"""Planning: compiles programs for TPUs without having them; reports memory, FLOPs and a roofline.

`python -m vl2jax.plan` is its command line.  Imports everything.  Start with `planning.py`;
`hlo.py` counts FLOPs, memory traffic and collectives of a compiled program.
"""
