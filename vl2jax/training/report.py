"""Parameters, bytes and FLOPs of a run, computed from shapes before it starts."""

import functools
import math
import types
from collections.abc import Iterable, Mapping

import jax
from jax.sharding import Mesh

from vl2jax.checkpoints.model_dir import flatten
from vl2jax.common.progress import human_bytes
from vl2jax.config import VL2Config
from vl2jax.model.vl2 import abstract_params
from vl2jax.training.run_config import RunConfig
from vl2jax.training.train_step import TrainState

_INPUT_EMBEDDING = "params/decoder/embed_tokens/embedding"


def activated_share(config: VL2Config, path: str) -> float:
    """The fraction of a parameter that is activated for one token, as the paper counts it.

    It is K / E for routed experts (K experts per token, E experts), 0 for the token embedding and
    1 for all other parameters.

    Args:
      config: architecture.
      path: path of the parameter, "params/...".
    """
    if path == _INPUT_EMBEDDING:
        return 0.0
    chosen, routed = config.decoder.num_experts_per_tok, config.decoder.n_routed_experts
    return chosen / routed if chosen and routed and "/experts/" in path else 1.0


@functools.cache
def _sizes(config: VL2Config) -> Mapping[str, int]:
    """Number of elements of each variable; cached, because a report needs it several times."""
    shapes = flatten(abstract_params(config))
    return types.MappingProxyType({path: leaf.size for path, leaf in shapes.items()})


def count_activated(config: VL2Config, *, part: str = "") -> int:
    """Number of activated parameters, of the whole model or of paths that start with `part`."""
    sizes = _sizes(config).items()
    chosen = {path: size for path, size in sizes if path.startswith(f"params/{part}")}
    return round(sum(activated_share(config, path) * size for path, size in chosen.items()))


def model_flops(config: VL2Config) -> tuple[float, float]:
    """FLOPs that the model needs for a forward and backward pass: 6 per activated parameter.

    Attention scores are not counted.

    Returns:
      FLOPs per token of the decoder, and FLOPs per tile of the vision tower and the adaptor.
    """
    patches, projected = config.vision.grid**2, config.tokens_per_tile
    count = functools.partial(count_activated, config)
    tile = patches * count(part="vision/") + projected * count(part="adaptor/")
    return 6.0 * count(part="decoder/"), 6.0 * tile


def describe_run(
    config: RunConfig,
    architecture: VL2Config,
    mesh: Mesh,
    state: TrainState,
    trained: Iterable[str],
) -> str:
    """Describes a run in a few lines, which `train.py` prints first.

    Args:
      config: configuration of the run.
      architecture: architecture of the model.
      mesh: mesh of the run.
      state: shapes and shardings of the train state.
      trained: paths of the trained parameters.
    """
    sizes = {path: leaf.size for path, leaf in flatten(state.params).items()}
    devices, batch = mesh.devices.ravel(), config.batch
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    kinds = sorted({leaf.dtype.name for leaf in moments})
    kept = {"parameters": state.params, "router": state.router, "optimizer": state.opt_state}
    nbytes = {name: sum(map(_nbytes, jax.tree.leaves(tree))) for name, tree in kept.items()}
    per_device = sum(map(_device_bytes, jax.tree.leaves((state.params, state.opt_state))))
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    packed = f"up to {batch.segments} samples" if batch.segments > 1 else "one sample"
    lines = {
        "devices": f"{len(devices)} {devices[0].platform} ({devices[0].device_kind})",
        "mesh": axes,
        "model": f"{sum(sizes.values()):,} parameters, {sum(sizes[p] for p in trained):,} trained,"
        f" {count_activated(architecture):,} activated per token"
        f" ({count_activated(architecture, part='decoder/'):,} in the decoder)",
        "memory": f"parameters {human_bytes(nbytes['parameters'])} ({config.compute.param_dtype}),"
        f" optimizer {human_bytes(nbytes['optimizer'])} ({', '.join(kinds)});"
        f" {human_bytes(per_device)} per device, plus gradients and activations",
        "step": f"{batch.rows} rows of {batch.length} tokens ({packed} per row),"
        f" {batch.rows * batch.length:,} tokens and {batch.tiles} tiles in"
        f" {batch.microbatches} {'microbatch' if batch.microbatches == 1 else 'microbatches'};"
        f" computed in {config.compute.dtype}",
        "run": f"{config.steps:,} steps, {config.steps * batch.rows * batch.length:,} tokens",
        "data": f"{config.data.train or 'none'}; held out: {config.data.heldout or 'none'}",
    }
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def _nbytes(leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _device_bytes(leaf) -> int:
    """Bytes of the shard of one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
