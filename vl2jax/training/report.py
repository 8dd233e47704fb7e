"""What a run is about to do, counted from shapes: parameters, bytes, floating-point operations."""

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
    """The part of a parameter that one text token's way through the decoder reads.

    Of the routed experts, those chosen; of the input embedding nothing, as the paper counts.
    """
    if path == _INPUT_EMBEDDING:
        return 0.0
    chosen, routed = config.decoder.num_experts_per_tok, config.decoder.n_routed_experts
    return chosen / routed if chosen and routed and "/experts/" in path else 1.0


@functools.cache
def _sizes(config: VL2Config) -> Mapping[str, int]:
    """Elements of each variable; asked for several times in one report."""
    shapes = flatten(abstract_params(config))
    return types.MappingProxyType({path: leaf.size for path, leaf in shapes.items()})


def count_activated(config: VL2Config, *, part: str = "") -> int:
    """Activated parameters, of the whole model or of the paths that begin with `part`."""
    sizes = _sizes(config).items()
    chosen = {path: size for path, size in sizes if path.startswith(f"params/{part}")}
    return round(sum(activated_share(config, path) * size for path, size in chosen.items()))


def model_flops(config: VL2Config) -> tuple[float, float]:
    """Operations of a forward and backward pass, per token of the decoder and per tile.

    Six per activated parameter; attention scores are not counted.
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
    """The first lines of a run.

    Args:
      state: shapes (with shardings) of all that is trained and kept.
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
        f" {count_activated(architecture):,} activated by a token"
        f" ({count_activated(architecture, part='decoder/'):,} of the decoder)",
        "memory": f"parameters {human_bytes(nbytes['parameters'])} ({config.compute.param_dtype}),"
        f" optimizer {human_bytes(nbytes['optimizer'])} ({', '.join(kinds)});"
        f" {human_bytes(per_device)} on each device, and gradients and activations",
        "step": f"{batch.rows} rows of {batch.length} tokens ({packed} a row),"
        f" {batch.rows * batch.length:,} tokens and {batch.tiles} tiles in"
        f" {batch.microbatches} {'part' if batch.microbatches == 1 else 'parts'};"
        f" computed in {config.compute.dtype}",
        "run": f"{config.steps:,} steps, {config.steps * batch.rows * batch.length:,} tokens",
        "data": f"{config.data.train or 'none'}; held out: {config.data.heldout or 'none'}",
    }
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def _nbytes(leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _device_bytes(leaf) -> int:
    """Bytes of one device's part."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
