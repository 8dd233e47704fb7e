"""Compares the counts of `hlo.py` with those of XLA, where XLA's are exact.

XLA counts a matrix product exactly, and the body of a loop once.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from vl2jax.plan.hlo import analyse, product_flops
from vl2jax.plan.hlo_text import Array, Instruction, parse


def check_products(text: str) -> int:
    """Compares the FLOPs of each matrix product of a program with XLA's count for it alone.

    Args:
      text: the program, `compiled.as_text()`.

    Returns:
      The number of different products.

    Raises:
      ValueError: the counts differ.
    """
    computations, _ = parse(text)
    found: dict[tuple, tuple[Instruction, list[Array], float]] = {}
    for computation in computations.values():
        for one in computation.values():
            if one.opcode in ("dot", "convolution"):
                operands = [computation[name].arrays[0] for name in one.operands[:2]]
                shapes = (*(a.shape for a in operands), one.arrays[0].shape)
                attributes = one.rest.partition(", metadata=")[0]
                found[(shapes, attributes)] = (one, operands, product_flops(computation, one))
    for one, operands, ours in found.values():
        shape, theirs = _xla_count(one, operands)
        if shape != one.arrays[0].shape or theirs != ours:
            raise ValueError(
                f"{one.opcode} {one.name} of {[a.shape for a in operands]}: the counter says"
                f" {ours:g} FLOPs for {one.arrays[0].shape}, XLA {theirs:g} for {shape};"
                f" {one.rest[:200]}"
            )
    return len(found)


def check_total(text: str, xla_flops: float) -> None:
    """Compares the products of a whole program with XLA's total, with each loop counted once.

    XLA's total also has the elementwise operations, so it is the larger one.

    Args:
      text: the program, `compiled.as_text()`.
      xla_flops: `compiled.cost_analysis()["flops"]`.

    Raises:
      ValueError: the products alone have more FLOPs than XLA's total.
    """
    ours = analyse(text, loops_once=True).flops
    if ours > xla_flops * (1 + 1e-6):
        raise ValueError(
            f"with each loop counted once, the counter finds {ours:g} FLOPs of products, but XLA"
            f" only {xla_flops:g} FLOPs in all"
        )


def _xla_count(one: Instruction, operands: list[Array]) -> tuple[tuple[int, ...], float]:
    """Shape and FLOPs of a product, compiled by itself."""
    make: Any = _dot if one.opcode == "dot" else _convolution
    shapes = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in operands]
    lowered = jax.jit(make(one)).lower(*shapes)
    costs: Any = lowered.cost_analysis()
    return lowered.out_info.shape, costs["flops"]


def _dot(one: Instruction):
    def dims(name: str) -> tuple[int, ...]:
        listed = re.search(rf"{name}_dims=\{{([\d,]*)\}}", one.rest)
        return tuple(int(n) for n in listed[1].split(",") if n) if listed else ()

    contracting = dims("lhs_contracting"), dims("rhs_contracting")
    batch = dims("lhs_batch"), dims("rhs_batch")
    return lambda a, b: jax.lax.dot_general(a, b, (contracting, batch))


def _convolution(one: Instruction):
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels is not None, one.rest
    spatial = sorted(label for label in labels[3] if label.isdigit())
    specs = [
        tuple(text.index(label) for label in (*first, *spatial))
        for text, first in zip(labels.groups(), ("bf", "oi", "bf"), strict=True)
    ]
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    parts = dict(part.split("=") for part in window[1].split()) if window else {}

    def numbers(name: str) -> list[int]:
        return [int(n) for n in parts[name].split("x")] if name in parts else [1] * len(spatial)

    pads = parts["pad"].split("x") if "pad" in parts else ["0_0"] * len(spatial)
    padding: Any = [tuple(int(n) for n in pad.split("_")) for pad in pads]
    groups = re.search(r"feature_group_count=(\d+)", one.rest)
    batches = re.search(r"batch_group_count=(\d+)", one.rest)
    return lambda a, b: jax.lax.conv_general_dilated(
        a,
        b,
        numbers("stride"),
        padding,
        lhs_dilation=numbers("lhs_dilate"),
        rhs_dilation=numbers("rhs_dilate"),
        dimension_numbers=jax.lax.ConvDimensionNumbers(*specs),
        feature_group_count=int(groups[1]) if groups else 1,
        batch_group_count=int(batches[1]) if batches else 1,
    )
