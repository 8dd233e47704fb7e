"""Synthetic data: generated images with questions and answers, so that nothing is downloaded.

`Synthetic(split, seed)` is a source of training rows, `question(family, index)` generates single
questions with their answers, `FAMILIES` describes the families of questions.  Imports `common`,
`config`, `processing` and `data`.  Start with `source.py`; `tokens.py` has the tokenizer.
"""

from vl2jax.synthetic.source import FAMILIES, Question, Synthetic, question
from vl2jax.synthetic.words import HELD_OUT

__all__ = ["FAMILIES", "HELD_OUT", "Question", "Synthetic", "question"]
