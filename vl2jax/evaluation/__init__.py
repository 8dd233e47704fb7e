"""Scores: how an answer is judged, and how scores are shown and compared.

Imports `processing`, `data` and `synthetic`; it scores text and knows no model.  Start with
`scoring.py`.
"""
