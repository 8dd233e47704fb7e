"""Counts what a compiled program does: products, memory traffic, collectives; loops included.

XLA's own `cost_analysis` counts the body of a loop once. Here everything is counted as often as it
runs: a loop over layers as many times as there are layers.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable

import numpy as np

from vl2jax.plan.hlo_text import Array, Computation, Instruction, group_of, parameters_of, parse

_FREE = {  # instructions that move nothing
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "call", "partition-id", "replica-id", "opt-barrier", "domain", "iota"),
}
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: of `hlo_text.COLLECTIVES`.
      nbytes: of the whole on one device: what is gathered, reduced, exchanged or passed on.
      group: numbers of the devices that take part together, one group of them.
      count: how often it runs.
      op_name: where it comes from.
    """

    kind: str
    nbytes: float
    group: tuple[int, ...]
    count: float
    op_name: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one run, on a ring."""
        share = (len(self.group) - 1) / max(len(self.group), 1)
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.nbytes * factor


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in a run of a program.

    Attributes:
      flops: of products (two per multiplication), kernels included.
      traffic: bytes between main memory and the chip.
      collectives: all of them.
      open_loops: where loops come from whose length the program does not tell.
      unknown_kernels: custom calls that nothing is known of.
    """

    flops: float
    traffic: float
    collectives: tuple[Collective, ...]
    open_loops: tuple[str, ...]
    unknown_kernels: tuple[str, ...]


# (name, operands, results) of a kernel -> (flops, bytes), or None where it is not known.
KernelCost = Callable[[str, list[Array], tuple[Array, ...]], tuple[float, float] | None]


def analyse(
    text: str,
    *,
    open_trips: Callable[[str], int | None] = lambda _: None,
    kernel_cost: KernelCost = lambda *_: None,
) -> Cost:
    """Counts what a compiled program does.

    Args:
      text: `compiled.as_text()`.
      open_trips: by the origin of a loop how often it runs, where the program does not tell; None:
        not known (it is counted once, and named).
      kernel_cost: of kernels that are known.
    """
    counter = _Counter(parse(text), open_trips, kernel_cost)
    counter.visit(counter.entry, 1.0, inside_fusion=False)
    return Cost(
        counter.flops,
        counter.traffic,
        tuple(counter.collectives.values()),
        tuple(dict.fromkeys(counter.open_loops)),
        tuple(dict.fromkeys(counter.unknown)),
    )


class _Counter:
    """Walks from the entry through everything that is called, as often as it is called."""

    def __init__(self, parsed, open_trips, kernel_cost):
        self.computations, self.entry = parsed
        self.open_trips, self.kernel_cost = open_trips, kernel_cost
        self.flops = self.traffic = 0.0
        self.collectives: dict[tuple[str, str], Collective] = {}
        self.open_loops: list[str] = []
        self.unknown: list[str] = []

    def visit(self, name: str, count: float, inside_fusion: bool) -> None:
        computation = self.computations[name]
        for instruction in computation.values():
            self.flops += count * self._flops(computation, instruction)
            fresh = self._collective(name, computation, instruction, count)
            if not inside_fusion:
                self.traffic += count * self._traffic(computation, instruction, fresh)
            if instruction.opcode == "custom-call":
                flops, traffic = self._kernel(computation, instruction)
                self.flops += count * flops
                self.traffic += count * traffic
            self._visit_called(instruction, count, inside_fusion)

    def _visit_called(self, instruction: Instruction, count: float, inside_fusion: bool) -> None:
        called = [name for name in instruction.called if name in self.computations]
        if instruction.opcode == "while":
            condition, body = self._while_parts(instruction)
            trips = self._trips(instruction, condition)
            self.visit(body, count * trips, False)
        elif instruction.opcode == "fusion":
            for name in called:
                self.visit(name, count, True)
        elif instruction.opcode in ("call", "conditional", "async-start"):
            for name in called:  # of a conditional one branch runs: the last, as XLA orders them
                if instruction.opcode != "conditional" or name == called[-1]:
                    self.visit(name, count, inside_fusion)

    @staticmethod
    def _while_parts(instruction: Instruction) -> tuple[str, str]:
        condition = _search(r"condition=%?([\w.\-]+)", instruction.rest)
        return condition[1], _search(r"body=%?([\w.\-]+)", instruction.rest)[1]

    def _trips(self, instruction: Instruction, condition: str) -> int:
        known = _TRIPS.search(instruction.rest)
        if known:
            return int(known[1])
        instructions = self.computations[condition]
        root = next(i for i in instructions.values() if i.is_root)
        if root.opcode == "fusion":  # the comparison, wrapped
            bounds = [instructions[n] for n in root.operands if n in instructions]
            inner = self.computations[root.called[0]].values()
            compares = any(i.opcode == "compare" and "direction=LT" in i.rest for i in inner)
        else:
            bounds = [instructions[n] for n in root.operands if n in instructions]
            compares = root.opcode == "compare" and "direction=LT" in root.rest
        constants = [i for i in bounds if i.opcode == "constant"]
        if compares and constants:
            return int(constants[0].arguments)
        trips = self.open_trips(instruction.op_name)
        if trips is None:
            self.open_loops.append(instruction.op_name)
        return 1 if trips is None else trips

    def _operands(self, computation: Computation, instruction: Instruction):
        return [computation[name] for name in instruction.operands if name in computation]

    def _flops(self, computation, instruction: Instruction) -> float:
        if instruction.opcode == "dot":
            left = self._operands(computation, instruction)[0].arrays[0]
            found = _search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
            contracted = [left.shape[int(d)] for d in found[1].split(",") if d]
            return 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(contracted)
        if instruction.opcode == "convolution":
            left, right = (i.arrays[0] for i in self._operands(computation, instruction)[:2])
            return _convolution_flops(left, right, instruction)
        return 0.0

    def _kernel(self, computation, instruction: Instruction) -> tuple[float, float]:
        """Flops and bytes of a hand-written kernel."""
        if "tpu_custom_call" not in instruction.rest:
            return 0.0, 0.0
        operands = [a for i in self._operands(computation, instruction) for a in i.arrays]
        known = self.kernel_cost(instruction.name, operands, instruction.arrays)
        if known is not None:
            return known
        estimate = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.rest)
        if estimate:
            values = json.loads(estimate[1])
            return float(values["flops"]), float(values["bytes_accessed"])
        self.unknown.append(instruction.name)
        return 0.0, sum(a.nbytes for a in (*operands, *instruction.arrays) if a.in_memory)

    def _collective(self, where: str, computation, instruction: Instruction, count: float) -> bool:
        """Notes a collective; False where this is a later part of one that is split up."""
        kind = instruction.kind
        if kind is None:
            return True
        targets = " ".join(i.rest for i in computation.values() if i.opcode == "custom-call")
        if "AsyncCollectiveDone" in targets or where.startswith("async_collective_fusion"):
            return False
        key = where, instruction.name
        if key in self.collectives:  # called from another place as well
            noted = self.collectives[key]
            self.collectives[key] = dataclasses.replace(noted, count=noted.count + count)
            return True
        operands = [a for i in self._operands(computation, instruction) for a in i.arrays]
        nbytes = sum(a.nbytes for a in operands)
        if kind == "all-gather":
            results = instruction.arrays
            if instruction.opcode.endswith("-start"):  # operands, then results
                results = results[len(operands) :]
            nbytes = max(nbytes, sum(a.nbytes for a in results))
        elif kind == "ragged-all-to-all":
            nbytes = operands[0].nbytes
        if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        group = group_of(instruction.rest)
        self.collectives[key] = Collective(kind, nbytes, group, count, instruction.op_name)
        return True

    def _traffic(self, computation, instruction: Instruction, fresh: bool) -> float:
        """Bytes between main memory and chip, of an instruction outside of fusions."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done") or opcode == "custom-call" or not fresh:
            return 0.0
        operands = self._operands(computation, instruction)
        if opcode == "fusion":
            inner = self.computations[instruction.called[0]]
            parameters = parameters_of(inner)
            read = sum(
                self._read(inner, parameters[place])
                for place, operand in enumerate(operands)
                if place in parameters and all(a.in_memory for a in operand.arrays)
            )
            root = next(i for i in inner.values() if i.is_root)
            parts = self._operands(inner, root) if root.opcode == "tuple" else [root]
            arrays = instruction.arrays
            written = sum(
                self._written(inner, part)
                for part, array in zip(parts, arrays, strict=False)
                if array.in_memory
            )
            return read + written
        results = instruction.arrays
        if opcode == "slice-start":  # what is sliced, the slice, bookkeeping
            results = results[1:2]
        elif opcode.endswith("-start"):  # what follows the destination is bookkeeping
            results = results[:1]
        if opcode in ("dynamic-slice", "slice", "slice-start", "gather"):
            moved = sum(a.nbytes for a in results)
            memory = [a.in_memory for a in (operands[0].arrays[0], results[0])]
            return moved * sum(memory)
        if opcode in ("dynamic-update-slice", "scatter"):
            return 2 * operands[1 if opcode == "dynamic-update-slice" else -1].nbytes
        arrays = [a for o in operands for a in o.arrays] + list(results)
        return sum(a.nbytes for a in arrays if a.in_memory)

    def _read(self, inner: Computation, parameter: Instruction) -> float:
        """Bytes of a fusion's parameter that it reads: of slices only what is sliced."""
        total = 0.0
        for user in inner.values():
            if parameter.name not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += user.nbytes if user.operands[0] == parameter.name else 0.0
            elif user.opcode in ("dynamic-update-slice", "scatter"):
                total += parameter.nbytes if user.operands[0] != parameter.name else 0.0
            elif user.opcode in ("bitcast", "get-tuple-element"):
                total += self._read(inner, user)
            elif user.opcode == "fusion":
                nested = self.computations[user.called[0]]
                parameters = parameters_of(nested)
                places = [p for p, name in enumerate(user.operands) if name == parameter.name]
                total += sum(self._read(nested, parameters[p]) for p in places)
            elif user.opcode != "tuple":
                total += parameter.nbytes
        return min(total, parameter.nbytes)

    def _written(self, inner: Computation, result: Instruction) -> float:
        """Bytes that a fusion writes for one of its results."""
        if result.opcode == "parameter" or result.opcode == "custom-call" or result.kind:
            return 0.0
        if result.opcode in ("dynamic-update-slice", "scatter"):  # in place
            put = 1 if result.opcode == "dynamic-update-slice" else -1
            return inner[result.operands[put]].nbytes
        if result.opcode == "bitcast" and result.operands[0] in inner:
            return self._written(inner, inner[result.operands[0]])
        if result.opcode == "fusion":
            nested = self.computations[result.called[0]]
            root = next(i for i in nested.values() if i.is_root)
            if root.opcode != "tuple":
                return self._written(nested, root)
        return result.nbytes


def _search(pattern: str, text: str) -> re.Match[str]:
    """What every instruction of its kind has."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in {text!r}; is this the text of another XLA?")
    return found


def _convolution_flops(left: Array, right: Array, instruction: Instruction) -> float:
    """Two per multiplication that does not meet padding; a batched product is such a thing, too."""
    labels = _search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    window = dict(
        re.findall(
            r"(\w+)=([\w\-]+)", (re.findall(r"window=\{([^}]*)\}", instruction.rest) or [""])[0]
        )
    )
    of = {
        name: dict(zip(text, array.shape, strict=True))
        for name, text, array in zip(
            ("left", "right", "out"),
            labels.groups(),
            (left, right, instruction.arrays[0]),
            strict=True,
        )
    }
    flops = 2.0 * of["out"]["b"] * of["out"]["f"] * of["right"]["i"]
    places = sorted(label for label in labels[3] if label.isdigit())
    parts = {name: value.split("x") for name, value in window.items()}
    for place, label in enumerate(places):
        get = lambda name, default, place=place: parts[name][place] if name in parts else default  # noqa: E731
        stride, dilate, spread = (int(get(n, "1")) for n in ("stride", "rhs_dilate", "lhs_dilate"))
        low = int(get("pad", "0_0").split("_")[0])
        flops *= _taps(
            of["out"][label], of["right"][label], of["left"][label], stride, dilate, spread, low
        )
    return flops


@functools.cache
def _taps(out: int, kernel: int, size: int, stride: int, dilate: int, spread: int, low: int) -> int:
    """Pairs of output place and kernel place that meet an element of the input."""
    where = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * dilate - low
    inside = (where >= 0) & (where <= (size - 1) * spread) & (where % spread == 0)
    return int(inside.sum())
