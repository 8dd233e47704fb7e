"""What every package may use: errors that users see, progress on a terminal, the look of plots,
peaks of chips, file locks, and the cache of compiled programs.

Imports nothing of the library.  Start with `errors.py`.
"""
