"""Parses the text of a compiled program (HLO) into computations and instructions."""

import dataclasses
import math
import re

import numpy as np

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    "collective-permute",
)
_ITEMSIZE = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array in the type of an instruction.

    Attributes:
      dtype: dtype in the notation of XLA.
      shape: dimensions.
      in_memory: whether it is in HBM, and not in memory on the chip.
    """

    dtype: str
    shape: tuple[int, ...]
    in_memory: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> float:
        """Size in bytes."""
        bits = re.search(r"\d+", self.dtype)
        size = _ITEMSIZE.get(self.dtype) or (int(bits[0]) / 8 if bits else 0)
        return self.size * size


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      name: name of the instruction.
      opcode: opcode, such as "dot" or "fusion".
      arrays: arrays of its type, that is, its results.
      operands: names of its operands.
      arguments: text between the parentheses.
      rest: text after the parentheses: attributes and metadata.
      is_root: whether its result is that of the computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    rest: str
    is_root: bool

    @property
    def nbytes(self) -> float:
        """Size of its results in bytes."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """Its origin in the JAX program; "" if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def kind(self) -> str | None:
        """Its kind in `COLLECTIVES`; None for other instructions and for `-done` halves."""
        name = self.opcode.removesuffix("-start")
        return name if name in COLLECTIVES else None

    @property
    def index(self) -> int:
        """The attribute `index` of a `get-tuple-element`."""
        return int(self.attribute("index"))

    def attribute(self, name: str) -> str:
        """Value of an attribute, a word.

        Raises:
          ValueError: the instruction does not have it.
        """
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        if found is None:
            raise ValueError(
                f"{self.opcode} {self.name} has no {name}; this version of XLA is not supported"
            )
        return found[1]

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls."""
        names = [a or b for a, b in _CALLS.findall(self.rest)]
        return tuple(part.strip().lstrip("%") for name in names for part in name.split(","))


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parses a program.

    Args:
      text: `compiled.as_text()`.

    Returns:
      Computations by name, each with its instructions by name, and the name of the entry.
    """
    computations, entry, current = {}, "", None
    for line in _whole_lines(text):
        header = _COMPUTATION.match(line)
        if header:
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    return computations, entry


def _whole_lines(text: str):
    """Yields the lines of a program; joins attributes that span several lines."""
    held = ""
    for line in text.splitlines():
        begins = line == "}" or line.startswith(("%", "ENTRY", "HloModule"))
        if begins or _INSTRUCTION.match(line):
            yield held
            held = line
        else:
            held += line
    yield held


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode, _, _ = text[end:].lstrip().partition("(")
    start = text.index("(", end)
    close = _closing(text, start)
    arguments = re.sub(r"/\*.*?\*/", "", text[start + 1 : close])
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    arrays = tuple(
        Array(
            dtype,
            tuple(int(size) for size in shape.split(",") if size),
            not re.search(r"S\([1-4,6-9]", layout or ""),
        )
        for dtype, shape, layout in _ARRAY.findall(text[:end])
    )
    rest = text[close + 1 :]
    return Instruction(name, opcode, arrays, operands, arguments, rest, is_root)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in re.compile(r"[()]").finditer(text, start):
        depth += 1 if place[0] == "(" else -1
        if not depth:
            return place.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def parameters_of(computation: Computation) -> dict[int, Instruction]:
    """The parameters of a computation, by number."""
    found = (i for i in computation.values() if i.opcode == "parameter")
    return {int(i.arguments): i for i in found}


def root_of(computation: Computation) -> Instruction:
    """The instruction whose result is that of the computation."""
    return next(i for i in computation.values() if i.is_root)


def group_of(rest: str) -> tuple[int, ...]:
    """Ids of the devices in the first group of a collective.

    Args:
      rest: `Instruction.rest`.
    """
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
    if pairs:
        return int(pairs[1]), int(pairs[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return tuple(int(n) for n in listed[1].split(","))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, source = (_ints(iota[1]), _ints(iota[2]))
        numbers = np.arange(math.prod(source)).reshape(source)
        numbers = numbers.transpose(_ints(iota[3])) if iota[3] else numbers
        return tuple(numbers.reshape(shape)[0].tolist())
    mesh = re.search(
        r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", rest
    )
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        chosen = re.findall(r"'(\w+)'", mesh[3])
        index = tuple(slice(None) if name in chosen else 0 for name in sizes)
        return tuple(numbers[index].ravel().tolist())
    return (0,)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))
