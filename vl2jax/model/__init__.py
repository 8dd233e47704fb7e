"""The paper's model in Flax: vision tower, adaptor, attention, experts, decoder, and their losses.

Pure functions of parameters and arrays; no file, no mesh, no platform.  Imports `config`,
`processing.batch`, `parallel.mesh` and `ops`.  Start with `vl2.py`, then `decoder.py`.
"""
