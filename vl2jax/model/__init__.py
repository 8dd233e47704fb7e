"""DeepSeek-VL2 in Flax: vision tower, adaptor, attention, experts, decoder, and the losses.

All of it is pure functions of parameters and arrays.  Nothing here reads a file or asks for the
platform.  Imports `common`, `config`, `processing` (the `Batch` record), `parallel` (sharding of
activations) and `ops`.  Start with `vl2.py`, then `decoder.py`.
"""
