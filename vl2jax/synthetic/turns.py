"""What a question is, and what it can be asked about."""

import dataclasses

import PIL.Image

from vl2jax.synthetic.scene import Box, Scene

TEXT, BOX, ABSENT = "text", "box", "absent"


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer, placeholders of images left out.

    Attributes:
      about: what the answer gives away; a row has one turn about it in each family.
      kind: `TEXT`, `BOX` or `ABSENT`: how it is scored.
      boxes: coordinates 0 to 999 over picture number `boxes_image`.
    """

    question: str
    answer: str
    about: str
    kind: str = TEXT
    boxes: tuple[Box, ...] = ()
    boxes_image: int = 0

    @property
    def width(self) -> int:
        """Columns that its text takes: a Chinese character two, any other one."""
        text = self.question + self.answer
        return len(text) + sum(not character.isascii() for character in text)


@dataclasses.dataclass(frozen=True)
class Situation:
    """Pictures that questions are about.

    Attributes:
      split: the split whose pairs may be named.
      scenes: what is in the pictures, where they are of shapes; in order.
      extra: what only some families know: a chart, the marked thing.
    """

    split: str
    scenes: tuple[Scene, ...] = ()
    extra: object = None

    @property
    def scene(self) -> Scene:
        """The only picture."""
        return self.scenes[0]

    def paint(self) -> list[PIL.Image.Image]:
        """The pictures, mode RGB."""
        return [scene.paint() for scene in self.scenes]
