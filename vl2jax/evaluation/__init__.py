"""Evaluation: scores answers against expected ones, and shows and compares scores.

It works on texts and boxes and never runs a model.  Imports `common`, `processing` and `synthetic`.
Start with `scoring.py`.
"""
