"""The paper's model in Flax: vision tower, adaptor, attention, experts, decoder, and their losses.

Pure functions of parameters and arrays: no file, no platform.  Imports `common`, `config`,
`processing` (the `Batch` record), `parallel` (where activations lie) and `ops`.  Start with
`vl2.py`, then `decoder.py`.
"""
