"""Products as XLA compiles them, with gradients in the dtype of the forward pass."""

import functools

import jax
import jax.numpy as jnp

from vl2jax.ops.matmul.int8 import Int8, Weight, scaled_product


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two operands with a float32 result, whatever their dtype."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def einsum(equation: str, x: jax.Array, w: Weight) -> jax.Array:
    """Activations times a weight: operands in the dtype of x, result float32, in every pass.

    The weight may be a float32 master copy while x is bfloat16: it is cast here, and its gradient
    is not rounded.  (The ordinary derivative multiplies with the float32 cotangent, which makes
    all products of the backward pass float32.)  An int8 weight has no gradient.

    Args:
      equation: two operands; each of their axes occurs in the other or in the result.
      x: activations.
      w: the weight.
    """
    if isinstance(w, Int8):
        return scaled_product(product, equation, x, w)
    return _einsum(equation, x, w)


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """[M, K] times [K, N] is float32[M, N]."""
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
