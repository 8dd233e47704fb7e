"""Parameters on disk: the model directory, reading it leaf by leaf, Orbax, and sizes in bytes.

A directory gets its name only when it is whole.  Imports `common`, `config` and `model`.
Start with `model_dir.py`.
"""
