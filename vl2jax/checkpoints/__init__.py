"""Checkpoints: the model directory, reading parameters one by one, Orbax, and sizes in bytes.

A checkpoint is written under a temporary name and renamed when it is complete.  Imports `common`,
`config` and `model`.  Start with `model_dir.py`.
"""
