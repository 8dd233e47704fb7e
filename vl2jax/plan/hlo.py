"""Counts the FLOPs, memory traffic and collectives of a compiled program.

XLA's `cost_analysis` counts the body of a loop once.  Here, it is counted once per iteration, for
example once per layer in a scan over layers.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable

import numpy as np

from vl2jax.plan.hlo_text import (
    Array,
    Computation,
    Instruction,
    group_of,
    parameters_of,
    parse,
    root_of,
)
from vl2jax.plan.scalars import UNKNOWN, Frame

_FREE = {  # instructions without memory traffic
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "call", "partition-id", "replica-id", "opt-barrier", "domain", "iota"),
}
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: one of `hlo_text.COLLECTIVES`.
      nbytes: bytes of the whole array on one device: the result of an all-gather, otherwise the
        operands.
      group: ids of the devices of its first group.
      count: how many times it runs.
      op_name: its origin in the program.
    """

    kind: str
    nbytes: float
    group: tuple[int, ...]
    count: float
    op_name: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends each time it runs, with a ring algorithm."""
        share = (len(self.group) - 1) / max(len(self.group), 1)
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.nbytes * factor


@dataclasses.dataclass(frozen=True)
class Cost:
    """Costs of one device in one run of a program.

    Attributes:
      flops: FLOPs of matrix products (two per multiply-add), including those of kernels.
      traffic: bytes read from and written to HBM.
      collectives: all collectives.
      open_loops: origins of the loops whose trip count is unknown, which are counted once, and of
        the conditionals whose choice is unknown and whose branches differ, which are counted with
        the largest number of each cost.
      unknown_kernels: names of the custom calls whose cost is unknown.
    """

    flops: float
    traffic: float
    collectives: tuple[Collective, ...]
    open_loops: tuple[str, ...]
    unknown_kernels: tuple[str, ...]


# (name, operands, results) of a kernel -> (FLOPs, bytes), or None if the kernel is unknown.
KernelCost = Callable[[str, list[Array], tuple[Array, ...]], tuple[float, float] | None]


def analyse(
    text: str,
    *,
    open_trips: Callable[[str], int | None] = lambda _: None,
    kernel_cost: KernelCost = lambda *_: None,
    loops_once: bool = False,
) -> Cost:
    """Counts the costs of a compiled program.

    Args:
      text: the program, `compiled.as_text()`.
      open_trips: returns the trip count of a loop that the program does not contain, given the
        origin of the loop; None: unknown.  Such a loop is counted once and reported in
        `open_loops`.  The trip count of other loops follows from start, condition and step.
      kernel_cost: returns the cost of a kernel.
      loops_once: counts every loop once, and no kernels, as XLA's `cost_analysis` does.
    """
    computations, entry = parse(text)
    if loops_once:
        kernel_cost = lambda *_: (0.0, 0.0)  # noqa: E731
    counter = _Counter(computations, open_trips, kernel_cost, loops_once)
    counter.visit(entry, 1.0, Frame(computations, entry), inside_fusion=False)
    return Cost(
        counter.flops,
        counter.traffic,
        tuple(counter.collectives.values()),
        tuple(dict.fromkeys(counter.open_loops)),
        tuple(dict.fromkeys(counter.unknown)),
    )


class _Counter:
    """Visits the entry computation and all computations that it calls, with their counts."""

    def __init__(self, computations, open_trips, kernel_cost, loops_once):
        self.computations, self.loops_once = computations, loops_once
        self.open_trips, self.kernel_cost = open_trips, kernel_cost
        self.flops = self.traffic = 0.0
        self.collectives: dict[tuple[str, str], Collective] = {}
        self.open_loops: list[str] = []
        self.unknown: list[str] = []

    def visit(self, name: str, count: float, frame: Frame, inside_fusion: bool) -> None:
        """Adds the costs of a computation that runs `count` times; `frame` has known scalars."""
        computation = self.computations[name]
        for instruction in computation.values():
            self.flops += count * product_flops(computation, instruction)
            fresh = self._collective(name, computation, instruction, count)
            if not inside_fusion:
                self.traffic += count * self._traffic(computation, instruction, fresh)
            if instruction.opcode == "custom-call":
                flops, traffic = self._kernel(computation, instruction)
                self.flops += count * flops
                self.traffic += count * traffic
            self._visit_called(instruction, count, frame, inside_fusion)

    def _visit_called(self, instruction: Instruction, count, frame: Frame, inside_fusion) -> None:
        called = [name for name in instruction.called if name in self.computations]
        if instruction.opcode == "while":
            body = instruction.attribute("body")
            trips = self._trips(instruction, frame)
            self.visit(body, count * trips, frame.body(instruction), False)
        elif instruction.opcode == "fusion":
            for name in called:
                self.visit(name, count, Frame(self.computations, name), True)
        elif instruction.opcode == "conditional":
            self._visit_branches(instruction, called, count, frame)
        elif instruction.opcode in ("call", "async-start"):
            for name in called:
                inner = frame.call(name, instruction.operands)
                self.visit(name, count, inner, inside_fusion)

    def _visit_branches(self, instruction: Instruction, called: list[str], count, frame) -> None:
        """Adds the branch that is taken; if that is not known, the largest of each cost."""
        frames = [
            frame.call(name, (operand,))
            for name, operand in zip(called, instruction.operands[1:], strict=True)
        ]
        choice = frame.value(instruction.operands[0])
        if choice is not UNKNOWN:
            is_index = instruction.operands and "branch_computations" in instruction.rest
            chosen = int(choice) if is_index else int(not choice)
            chosen = chosen if 0 <= chosen < len(called) else len(called) - 1
            self.visit(called[chosen], count, frames[chosen], False)
            return
        branches = []
        for name, inner in zip(called, frames, strict=True):
            options = self.open_trips, self.kernel_cost, self.loops_once
            branch = _Counter(self.computations, *options)
            branch.visit(name, count, inner, False)
            branches.append(branch)
        if len({branch.totals for branch in branches}) > 1:
            self.open_loops.append(instruction.op_name)
        self.flops += max(branch.flops for branch in branches)
        self.traffic += max(branch.traffic for branch in branches)
        self.collectives |= max(branches, key=lambda branch: branch.sent).collectives
        for branch in branches:
            self.open_loops += branch.open_loops
            self.unknown += branch.unknown

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(one.sent * one.count for one in self.collectives.values())

    @property
    def totals(self) -> tuple[float, float, float]:
        """FLOPs, traffic and bytes that a device sends."""
        return self.flops, self.traffic, self.sent

    def _trips(self, instruction: Instruction, frame: Frame) -> int:
        if self.loops_once:
            return 1
        known = _TRIPS.search(instruction.rest)
        trips = int(known[1]) if known else frame.trips(instruction)
        if trips is None:
            trips = self.open_trips(instruction.op_name)
        if trips is None:
            self.open_loops.append(instruction.op_name)
        return 1 if trips is None else trips

    def _operands(self, computation: Computation, instruction: Instruction):
        return [computation[name] for name in instruction.operands if name in computation]

    def _kernel(self, computation, instruction: Instruction) -> tuple[float, float]:
        """FLOPs and bytes of a Pallas kernel."""
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
        """Records a collective; returns False for a later part of an asynchronous one."""
        kind = instruction.kind
        if kind is None:
            return True
        targets = " ".join(i.rest for i in computation.values() if i.opcode == "custom-call")
        if "AsyncCollectiveDone" in targets or where.startswith("async_collective_fusion"):
            return False
        key = where, instruction.name
        if key in self.collectives:  # its computation has several callers
            noted = self.collectives[key]
            self.collectives[key] = dataclasses.replace(noted, count=noted.count + count)
            return True
        operands = [a for i in self._operands(computation, instruction) for a in i.arrays]
        nbytes = sum(a.nbytes for a in operands)
        if kind == "all-gather":
            results = instruction.arrays
            if instruction.opcode.endswith("-start"):  # its type lists operands, then results
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
        """HBM traffic in bytes of an instruction outside fusions."""
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
            root = root_of(inner)
            parts = self._operands(inner, root) if root.opcode == "tuple" else [root]
            arrays = instruction.arrays
            written = sum(
                self._written(inner, part)
                for part, array in zip(parts, arrays, strict=False)
                if array.in_memory
            )
            return read + written
        results = instruction.arrays
        if opcode == "slice-start":  # its type lists the operand, the slice, and bookkeeping
            results = results[1:2]
        elif opcode.endswith("-start"):  # its type lists the destination, then bookkeeping
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
        """Bytes of a parameter that a fusion reads; if it is only sliced, those of the slices."""
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
            elif self._is_cast(user) and not user.is_root:  # only what is read of it is cast
                total += self._read(inner, user) * parameter.nbytes / user.nbytes
            elif user.opcode == "fusion":
                nested = self.computations[user.called[0]]
                parameters = parameters_of(nested)
                places = [p for p, name in enumerate(user.operands) if name == parameter.name]
                total += sum(self._read(nested, parameters[p]) for p in places)
            elif user.opcode != "tuple":
                total += parameter.nbytes
        return min(total, parameter.nbytes)

    def _is_cast(self, instruction: Instruction) -> bool:
        """Whether it changes only dtype or layout, alone or as a fusion inside a fusion."""
        if instruction.opcode == "fusion":
            nested = self.computations[instruction.called[0]]
            kinds = {one.opcode for one in nested.values()} - {"bitcast"}
            return len(parameters_of(nested)) == 1 and kinds <= {"parameter", "copy", "convert"}
        return instruction.opcode in ("copy", "convert")

    def _written(self, inner: Computation, result: Instruction) -> float:
        """Bytes that a fusion writes for one result."""
        if result.opcode == "parameter" or result.opcode == "custom-call" or result.kind:
            return 0.0
        if result.opcode in ("dynamic-update-slice", "scatter"):  # updates its operand in place
            put = 1 if result.opcode == "dynamic-update-slice" else -1
            return inner[result.operands[put]].nbytes
        if result.opcode == "bitcast" and result.operands[0] in inner:
            return self._written(inner, inner[result.operands[0]])
        if result.opcode == "fusion":
            nested = self.computations[result.called[0]]
            root = root_of(nested)
            if root.opcode != "tuple":
                return self._written(nested, root)
        return result.nbytes


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a matrix product or a convolution; 0 for other instructions."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (computation[name].arrays[0] for name in instruction.operands[:2])
    if instruction.opcode == "convolution":
        return _convolution_flops(left, right, instruction)
    found = _search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    contracted = [left.shape[int(d)] for d in found[1].split(",") if d]
    return 2.0 * instruction.arrays[0].size * math.prod(contracted)


def _search(pattern: str, text: str) -> re.Match[str]:
    """Searches for a pattern that must be there; raises ValueError if it is not."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in {text!r}; this version of XLA is not supported")
    return found


def _convolution_flops(left: Array, right: Array, instruction: Instruction) -> float:
    """FLOPs of a convolution without padding; on TPU, batched products are convolutions, too."""
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
    """Number of pairs of output and kernel positions that multiply an element of the input."""
    where = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * dilate - low
    inside = (where >= 0) & (where <= (size - 1) * spread) & (where % spread == 0)
    return int(inside.sum())
