"""Answers: a loaded model, the engine's queue, compiled steps, sampling, image and prefix caches.

Imports everything to its left, never `training` or a command line.  Start with `engine.py`; stop
conditions are in `completion.py`.
"""
