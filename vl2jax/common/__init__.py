"""Utilities of all packages: user errors, progress bars, plot style, chip data sheets, file locks,
and the cache of compiled programs.

Imports no other package of the library.  Start with `errors.py`.
"""
