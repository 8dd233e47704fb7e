"""Linear layers, norms and the gated MLP: inputs and outputs in `dtype`, sums in float32."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vl2jax.model.parameter import parameter
from vl2jax.ops.matmul import Weight, matmul
from vl2jax.ops.names import EXCHANGED, PRODUCT

_policies = jax.checkpoint_policies

# Rematerialisation policies: what the forward pass of a layer saves besides the layer's input.  The
# backward pass recomputes the rest.
#   none: everything is saved.
#   full: nothing else is saved.
#   dots: saves the results of matrix products, including those inside attention and experts (named
#     `PRODUCT`), and the rows received in an expert exchange (named `EXCHANGED`).  Norms,
#     activations and gathers are recomputed.
#   exchange: saves only the rows received in an expert exchange.
REMAT = {
    "none": None,
    "full": _policies.nothing_saveable,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(PRODUCT, EXCHANGED),
    ),
    "exchange": _policies.save_only_these_names(EXCHANGED),
}


def remat_layer(layer: type[nn.Module], remat: str) -> type[nn.Module]:
    """Wraps a layer class in the rematerialisation policy `REMAT[remat]`, for use in `nn.scan`."""
    if remat == "none":
        return layer
    return nn.remat(layer, prevent_cse=False, policy=REMAT[remat])


def fan_in_normal(fan_in: int) -> nn.initializers.Initializer:
    """Normal initializer with variance 1 / fan_in."""
    return nn.initializers.normal(1 / math.sqrt(fan_in))


def expand_leading(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Adds leading axes of size 1 so that `vector` broadcasts over the trailing axes of `like`."""
    return jnp.expand_dims(vector, range(like.ndim - vector.ndim))


class Kernel(nn.Module):
    """Returns its parameter `kernel`, for callers that apply the weight themselves."""

    shape: tuple[int, ...]
    kernel_init: nn.initializers.Initializer
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> Weight:
        return parameter(self, "kernel", self.kernel_init, self.shape, self.param_dtype)


class Linear(nn.Module):
    """Computes `y = x W + b` over the last `num_in` axes of x, accumulated in float32.

    Attributes:
      features: sizes of the output axes; the kernel is [*inputs, *features], the bias [*features].
      num_in: number of trailing axes of x that are contracted.
      major: index in `features` of the axis that a mesh shards.  The product joins the output axes
        with this one first, because a joined axis cannot be sharded along a later one.
      kernel_init: initializer of the kernel; None: normal with variance 1 / number of inputs.
    """

    features: tuple[int, ...]
    num_in: int = 1
    major: int = 0
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x.shape[x.ndim - self.num_in :]
        init = self.kernel_init or fan_in_normal(math.prod(inputs))
        kernel = parameter(self, "kernel", init, (*inputs, *self.features), self.param_dtype)
        rows, size = x.shape[: x.ndim - self.num_in], math.prod(inputs)
        x = x.astype(self.dtype).reshape(-1, size)
        y = matmul(x, _matrix(kernel, self.num_in, self.major))
        first = self.features[self.major]
        rest = self.features[: self.major] + self.features[self.major + 1 :]
        y = jnp.moveaxis(y.reshape(*rows, first, *rest), len(rows), len(rows) + self.major)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, self.features, self.param_dtype)
            y += expand_leading(bias.astype(jnp.float32), y)
        return y.astype(self.dtype)


def _matrix(kernel: Weight, num_in: int, major: int) -> Weight:
    """Reshapes a kernel [*inputs, *outputs] to [inputs, outputs], output axis `major` first."""

    def join(a: jax.Array) -> jax.Array:
        inputs = math.prod(a.shape[:num_in])
        return jnp.moveaxis(a, num_in + major, num_in).reshape(inputs, -1)

    return jax.tree.map(join, kernel)


class RMSNorm(nn.Module):
    """Computes `x / sqrt(mean(x^2) + eps)` in float32, then multiplies by scale in `dtype`."""

    eps: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return expand_leading(scale.astype(self.dtype), x) * normed.astype(self.dtype)


class LayerNorm(nn.Module):
    """LayerNorm with scale and bias, computed in float32 (eps 1e-6, as in SigLIP)."""

    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        scale, bias = (expand_leading(p.astype(jnp.float32), x) for p in (scale, bias))
        return (normed * scale + bias).astype(self.dtype)


class GatedMLP(nn.Module):
    """SwiGLU feed-forward network of the decoder: `down(silu(gate(x)) * up(x))`."""

    intermediate_size: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(features: int, name: str) -> Linear:
            return Linear(
                (features,),
                kernel_init=self.kernel_init,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        gate = linear(self.intermediate_size, "gate_proj")(x)
        up = linear(self.intermediate_size, "up_proj")(x)
        return linear(x.shape[-1], "down_proj")(nn.silu(gate) * up)
