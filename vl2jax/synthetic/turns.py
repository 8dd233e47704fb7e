"""Records: a question with its answer, and the images that it is about."""

import dataclasses

import PIL.Image

from vl2jax.synthetic.scene import Box, Scene

TEXT, BOX, ABSENT = "text", "box", "absent"


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
      question: the question, without image placeholders.
      answer: the correct answer.
      about: the subject; a row has at most one turn of each family about a subject.
      kind: `TEXT`, `BOX` or `ABSENT`; how answers are scored.
      boxes: (x0, y0, x1, y1) of each box of the answer, from 0 to 999.
      boxes_image: number of the image that the boxes refer to, from 0.
    """

    question: str
    answer: str
    about: str
    kind: str = TEXT
    boxes: tuple[Box, ...] = ()
    boxes_image: int = 0

    @property
    def width(self) -> int:
        """Width of its text in columns: 2 for a character outside ASCII, 1 for others."""
        text = self.question + self.answer
        return len(text) + sum(not character.isascii() for character in text)


@dataclasses.dataclass(frozen=True)
class Situation:
    """The images that questions are about.

    Attributes:
      split: the split, which determines the pairs of colour and shape that questions may name.
      scenes: content of each image, in order.
      extra: data for a specific family, such as the marked object.
    """

    split: str
    scenes: tuple[Scene, ...] = ()
    extra: object = None

    @property
    def scene(self) -> Scene:
        """The first scene."""
        return self.scenes[0]

    def paint(self) -> list[PIL.Image.Image]:
        """Draws the images, mode RGB."""
        return [scene.paint() for scene in self.scenes]
