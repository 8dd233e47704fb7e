"""Scores: how an answer is judged, and how scores are shown and compared.

It scores text and boxes and knows no model.  Imports `common`, `processing` and `synthetic`.
Start with `scoring.py`.
"""
