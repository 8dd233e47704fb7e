"""People's input to integers, on the host: pictures to tiles, conversations to tokens to batches.

Imports `common` and `config`; no JAX but for the `Batch` record.  Start with `processor.py`; the
tile choice is in `image.py`, chat formats and roles are in `prompt.py`.
"""
