"""Inference: loading a model, the engine, its compiled steps, sampling, image and prefix caches.

Imports everything to its left, never `training` or a command line.  Start with `engine.py`; stop
conditions are in `completion.py`.
"""
