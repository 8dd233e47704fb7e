"""Preprocessing on the host: images to tiles, conversations to tokens, samples to batches.

Runs on numpy and PIL; only the `Batch` record uses Flax.  Imports `common` and `config`.  Start
with `processor.py`; `image.py` chooses the tiling, `prompt.py` has chat formats and roles.
"""
