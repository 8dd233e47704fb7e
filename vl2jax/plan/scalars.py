"""Values of scalars in a compiled program, as far as the program contains them; trip counts."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vl2jax.plan.hlo_text import Array, Computation, Instruction, root_of

MAX_TRIPS = 1 << 16  # loops that run longer count as unknown
UNKNOWN = None

_DTYPES = {
    "pred": np.bool_,
    "bf16": jnp.bfloat16,
    **{
        f"{kind}{bits}": np.dtype(f"{name}{bits}")
        for kind, name in (("s", "int"), ("u", "uint"))
        for bits in (8, 16, 32, 64)
    },
    **{f"f{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
}
_COMPARISONS = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_BINARY: dict[str, Callable] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
}
_SAME = ("copy", "bitcast", "reshape", "opt-barrier", "copy-done")


class LazyTuple:
    """A tuple whose values are computed when they are asked for."""

    def __init__(self, get: Callable[[int], Any]):
        self._get = functools.cache(get)

    def __getitem__(self, index: int) -> Any:
        return self._get(index)


class Frame:
    """One call of a computation.

    Attributes:
      computation: the computation.

    Args:
      computations: all computations of the program, by name.
      name: name of the computation.
      arguments: values of its parameters; those that are not given are unknown.
    """

    def __init__(self, computations: dict[str, Computation], name: str, arguments: Sequence = ()):
        self._computations, self._arguments = computations, arguments
        self.computation = computations[name]
        self._found: dict[str, Any] = {}

    def value(self, name: str) -> Any:
        """Value of an instruction: a NumPy scalar, a `LazyTuple`, or `UNKNOWN`."""
        if name not in self._found:
            self._found[name] = self._compute(self.computation[name])
        return self._found[name]

    def result(self) -> Any:
        """Value of the computation."""
        return self.value(root_of(self.computation).name)

    def call(self, name: str, operands: Sequence[str]) -> "Frame":
        """The frame of a computation that this one calls with these instructions as arguments."""
        arguments = [self.value(o) if o in self.computation else UNKNOWN for o in operands]
        return Frame(self._computations, name, arguments)

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs; None: the program does not say."""
        state = self.value(loop.operands[0])
        for trips in range(MAX_TRIPS + 1):
            goes_on = Frame(self._computations, loop.attribute("condition"), [state]).result()
            if goes_on is UNKNOWN:
                return None
            if not goes_on:
                return trips
            state = Frame(self._computations, loop.attribute("body"), [state]).result()
        return None

    def body(self, loop: Instruction) -> "Frame":
        """The frame of a loop's body in any iteration; known are values that it does not change."""
        name = loop.attribute("body")
        body, initial = self._computations[name], self.value(loop.operands[0])
        root = root_of(body)

        def unchanged(index: int) -> Any:
            if root.opcode != "tuple" or not isinstance(initial, LazyTuple):
                return UNKNOWN
            part = body[root.operands[index]]
            while part.opcode in _SAME:
                part = body[part.operands[0]]
            passed = part.opcode == "get-tuple-element" and part.index == index
            passed = passed and body[part.operands[0]].opcode == "parameter"
            return initial[index] if passed else UNKNOWN

        return Frame(self._computations, name, [LazyTuple(unchanged)])

    def _compute(self, instruction: Instruction) -> Any:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            place = int(instruction.arguments)
            return self._arguments[place] if place < len(self._arguments) else UNKNOWN
        if opcode == "tuple":
            return LazyTuple(lambda index: self.value(operands[index]))
        if opcode == "get-tuple-element":
            whole = self.value(operands[0])
            return whole[instruction.index] if isinstance(whole, LazyTuple) else UNKNOWN
        if opcode in ("fusion", "call"):
            return self.call(instruction.called[0], operands).result()
        if opcode == "copy-start":
            return self.value(operands[0])
        if opcode in _SAME:
            return self.value(operands[0])
        array = instruction.arrays[0]
        if len(instruction.arrays) != 1 or array.size != 1 or array.dtype not in _DTYPES:
            return UNKNOWN
        if opcode == "constant":
            return _parse(instruction.arguments, array)
        return self._scalar(instruction, _DTYPES[array.dtype])

    def _scalar(self, instruction: Instruction, dtype: Any) -> Any:
        """Value of an operation on scalars."""
        opcode = instruction.opcode
        if opcode not in ("compare", "convert", "not", "select", *_BINARY):
            return UNKNOWN
        values = [self.value(name) for name in instruction.operands]
        if opcode == "select":
            chosen = values[0] if values[0] is UNKNOWN else values[1 if values[0] else 2]
            return chosen
        if any(value is UNKNOWN for value in values):
            return UNKNOWN
        if opcode == "compare":
            return np.bool_(_COMPARISONS[instruction.attribute("direction")](*values))
        if opcode == "convert":
            return np.asarray(values[0]).astype(dtype)[()]
        if opcode == "not":
            return np.invert(values[0])
        with np.errstate(over="ignore"):  # integers wrap around
            return np.asarray(_BINARY[opcode](*values)).astype(dtype)[()]


def _parse(text: str, array: Array) -> Any:
    """Value of a constant with one element, such as "3", "{-inf}" or "true"."""
    text = text.strip("{} ")
    if array.dtype == "pred":
        return np.bool_(text == "true")
    kind = int if array.dtype[0] in "su" else float
    return np.asarray(kind(text)).astype(_DTYPES[array.dtype])[()]
