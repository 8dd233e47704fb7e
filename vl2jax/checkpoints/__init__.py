"""Parameters on disk: the model directory, reading it leaf by leaf, Orbax, and sizes in bytes.

Imports `common`, `config` and `model`.  Start with `model_dir.py`.
"""
