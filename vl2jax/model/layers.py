"""Linear maps and norms: bfloat16 in and out where asked, float32 inside."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vl2jax.model.parameter import parameter
from vl2jax.ops.matmul import Weight, matmul
from vl2jax.ops.names import EXCHANGED, PRODUCT

_policies = jax.checkpoint_policies

# What the forward pass of a layer keeps for the backward pass, which computes the rest again:
# everything; the layer's input alone; what products give, also those within attention and experts
# (which name it `PRODUCT`), and what an exchange among experts has brought, so that only norms,
# activations and gathers are computed twice; what the exchange has brought alone.
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
    """The layer class under a policy of `REMAT`, for use inside `nn.scan`."""
    if remat == "none":
        return layer
    return nn.remat(layer, prevent_cse=False, policy=REMAT[remat])


def fan_in_normal(fan_in: int) -> nn.initializers.Initializer:
    """Normal initial values with variance 1 / fan_in."""
    return nn.initializers.normal(1 / math.sqrt(fan_in))


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """`vector` with leading axes of size 1, so that it spreads over the trailing axes of `like`."""
    return jnp.expand_dims(vector, range(like.ndim - vector.ndim))


class Kernel(nn.Module):
    """A bare weight named `kernel`, for maps that are used in more than one way; see `einsum`."""

    shape: tuple[int, ...]
    kernel_init: nn.initializers.Initializer
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> Weight:
        return parameter(self, "kernel", self.kernel_init, self.shape, self.param_dtype)


class Linear(nn.Module):
    """`y = x W + b` over the last `num_in` axes of x, accumulated in float32.

    Attributes:
      features: output axes; the kernel has shape [*inputs, *features], the bias [*features].
      num_in: how many trailing axes of x are contracted.
      kernel_init: initial values of the kernel; None: normal with variance 1 / inputs.
    """

    features: tuple[int, ...]
    num_in: int = 1
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
        x, kernel = x.astype(self.dtype).reshape(-1, size), _matrix(kernel, self.num_in)
        y = matmul(x, kernel).reshape(*rows, *self.features)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, self.features, self.param_dtype)
            y += along_last(bias.astype(jnp.float32), y)
        return y.astype(self.dtype)


def _matrix(kernel: Weight, num_in: int) -> Weight:
    """[*inputs, *outputs] with `num_in` inputs as [inputs, outputs]."""
    return jax.tree.map(lambda a: a.reshape(math.prod(a.shape[:num_in]), -1), kernel)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` in float32, then scaled in the compute dtype."""

    eps: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return along_last(scale.astype(self.dtype), x) * normed.astype(self.dtype)


class LayerNorm(nn.Module):
    """LayerNorm with scale and bias, in float32 throughout (eps 1e-6, as in SigLIP)."""

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
        scale, bias = (along_last(p.astype(jnp.float32), x) for p in (scale, bias))
        return (normed * scale + bias).astype(self.dtype)


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, the feed-forward network of the decoder."""

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
