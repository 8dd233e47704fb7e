"""Synthetic pictures with questions and answers: the data that needs no download.

`Synthetic(split, seed)` is a source of training rows, `question(family, index)` gives single
questions with their true answers, `FAMILIES` names what is asked.  Imports `common`, `config`,
`processing` and `data`.  Start with `source.py`; `tokens.py` has the tokenizer.
"""

from vl2jax.synthetic.source import FAMILIES, Question, Synthetic, question
from vl2jax.synthetic.words import HELD_OUT

__all__ = ["FAMILIES", "HELD_OUT", "Question", "Synthetic", "question"]
