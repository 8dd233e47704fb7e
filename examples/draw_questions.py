"""Draws question.png and grounding.png, two images of the held-out synthetic split.

python examples/draw_questions.py
"""

import itertools
from pathlib import Path

from vl2jax.synthetic import question

HERE = Path(__file__).parent


def first(family: str, text: str):
    """Returns the first held-out question of a family that contains a text."""
    for index in itertools.count():
        found = question(family, index)
        if text in found.row.messages[0]["content"]:
            return found


for name, family, text in (
    ("question", "count", "How many shapes do you see?"),
    ("grounding", "grounding", "Locate <|ref|>the green square<|/ref|>"),
):
    drawn = first(family, text)
    drawn.row.images[0].save(HERE / f"{name}.png")
    print(f"{name}.png: {drawn.row.messages[0]['content']!r} -> {drawn.answer!r}")
