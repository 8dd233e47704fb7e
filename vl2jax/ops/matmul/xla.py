"""Matrix products compiled by XLA; the backward pass uses operands in the same dtype."""

import functools

import jax
import jax.numpy as jnp

from vl2jax.ops.matmul.int8 import Int8, Weight, scaled_product


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two operands with a float32 result, for operands of any float dtype.

    A float32 product is exact to float32 rounding on every platform.  By default, a TPU would round
    its operands to bfloat16, and a GPU to TF32.
    """
    is_float32 = jnp.result_type(a, b) == jnp.float32
    precision = jax.lax.Precision.HIGHEST if is_float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def einsum(equation: str, x: jax.Array, w: Weight) -> jax.Array:
    """Einsum of activations and a weight.

    In both passes operands have the dtype of x, and products accumulate in float32.  The weight may
    be a float32 master copy while x is bfloat16: it is cast here, and its gradient stays float32.
    JAX's own derivative would multiply by the float32 cotangent, so all products of the backward
    pass would be float32.  An int8 weight has no gradient.

    Args:
      equation: an einsum of two operands.  Each axis of an operand must occur in the other operand
        or in the result.
      x: activations.
      w: the weight.

    Returns:
      float32, with the axes of the equation's result.
    """
    if isinstance(w, Int8):
        return scaled_product(product, equation, x, w)
    return _einsum(equation, x, w)


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """Computes `x w`: [M, K] times [K, N] is float32[M, N]."""
    return einsum("MK,KN->MN", x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return product(equation, x, w.astype(x.dtype))


def _einsum_forward(equation, x, w):
    return _einsum(equation, x, w), (x, w)


def _einsum_backward(equation, residuals, g):
    (x, w), g = residuals, g.astype(residuals[0].dtype)
    operands, out = equation.split("->")
    left, right = operands.split(",")
    d_x = product(f"{out},{right}->{left}", g, w.astype(x.dtype))
    d_w = product(f"{left},{out}->{right}", x, g)
    return d_x.astype(x.dtype), d_w.astype(w.dtype)


_einsum.defvjp(_einsum_forward, _einsum_backward)
