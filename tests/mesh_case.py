"""A model whose sizes every mesh of eight devices divides, and batches with rows of all kinds."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vl2jax.config import AdaptorConfig, DecoderConfig, VisionConfig, VL2Config
from vl2jax.data.packing import BatchShape, Packer, assemble
from vl2jax.model.vl2 import VL2, abstract_params
from vl2jax.processing.batch import FIRST_TILE_ROW, Batch
from vl2jax.processing.collate import Sample, collate
from vl2jax.training.optim import OptimConfig, learning_rate, make_optimizer, trained_paths
from vl2jax.training.train_step import Recipe, TrainState, new_state

POOLS, LENGTH, TILES, STEPS = 8, 24, 3, 5


def architecture(attention: str) -> VL2Config:
    """MLA or MHA, one dense and two MoE layers, sigmoid router with correction bias."""
    kind = dict(use_mla=attention == "mla", kv_lora_rank=8, q_lora_rank=None)
    decoder = DecoderConfig(
        **kind,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
        aux_loss_alpha=0.01,
        initializer_range=0.2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    return VL2Config(
        vision=VisionConfig(image_size=8, patch_size=4, width=32, layers=1, heads=4),
        adaptor=AdaptorConfig(input_dim=32, n_embed=32),
        decoder=decoder,
        candidate_resolutions=((8, 8),),
    )


def recipe(config: VL2Config, pools: int = 1, **options) -> Recipe:
    """AdamW that also stores the gradients; a large eps keeps rounding errors from growing."""
    optim = OptimConfig(lr=0.01, schedule="constant", eps=1e-2, clip_norm=1.0)
    keeper = optax.GradientTransformation(
        lambda params: {path: jnp.zeros_like(value) for path, value in params.items()},
        lambda grads, state, params=None: (grads, grads),
    )
    flat = jax.tree_util.tree_leaves_with_path(abstract_params(config)["params"])
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    return Recipe(
        model=VL2(config, max_segments=3, tile_pools=pools, **options),
        optimizer=optax.chain(keeper, make_optimizer(optim, 10)),
        schedule=learning_rate(optim, 10),
        trained=trained_paths(optim, paths),
        bias_update_step=0.01,
        loss_chunk=8,
    )


def drawn(shapes, deviation: float):
    """Random parameters, drawn with NumPy to save compilations; the scales of norms are 1."""
    rng = np.random.default_rng(0)

    def draw(path, leaf) -> np.ndarray:
        if "scale" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, np.float32)
        return rng.normal(0, deviation, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def start(recipe: Recipe, routing: str = "free") -> TrainState:
    """The state before the first step, with `drawn` parameters.

    If `routing` is "extreme", all tokens choose one expert, and none chooses four others.
    """
    shapes = abstract_params(recipe.model.config)
    params = drawn(shapes["params"], 0.15)
    bias = np.array([0, -9, 0, -9, 0, 9, -9, -9] if routing == "extreme" else [0] * 8, np.float32)
    router = jax.tree.map(lambda leaf: np.broadcast_to(bias, leaf.shape), shapes["router"])
    return new_state(recipe, {"params": params, "router": router})


def _sample(rng: np.random.Generator) -> Sample:
    """Random tokens with up to two tiles (one token each), and if any a newline and a separator."""
    tiles, length = int(rng.integers(0, 3)), int(rng.integers(6, 16))
    index = np.full(length, -1, np.int32)
    index[1 : 1 + tiles] = FIRST_TILE_ROW + np.arange(tiles)
    index[4 : 4 + (tiles > 0) * 2] = [0, 1][: (tiles > 0) * 2]
    return Sample(
        tokens=rng.integers(2, 64, length).astype(np.int32),
        image_index=index,
        loss_mask=rng.random(length) < 0.6,
        tiles=rng.integers(0, 256, (tiles, 8, 8, 3), np.uint8),
        image_sizes=((8, 8),) * tiles,
        image_tiles=((1, 1),) * tiles,
        image_tokens=(1,) * tiles,
        prompt_length=1,
        display="",
    )


@functools.cache
def pooled_batches() -> list[Batch]:
    """One batch per step, with eight pools of one row; some rows have padding."""
    rng, found = np.random.default_rng(0), []
    shape = BatchShape(pools=POOLS, rows=1, length=LENGTH, tiles=TILES, segments=3)
    packer = Packer(shape, waiting=2)
    stream = (types.SimpleNamespace(sample=_sample(rng)) for _ in iter(int, 1))
    for _ in range(STEPS):
        placed = [(place, item.sample) for place, item in packer.fill(stream)]
        found.append(assemble(placed, shape, pad_id=0, tile_side=8, tokens_per_tile=1))
    return found


def batches(pools: int) -> list[Batch]:
    """The same rows and tiles in fewer pools, as one microbatch: [1, rows or tiles, ...]."""
    joined = POOLS // pools

    def join(batch: Batch) -> Batch:
        shift = (np.arange(POOLS) % joined * TILES)[:, None, None]
        index = batch.image_index + np.where(batch.image_index >= FIRST_TILE_ROW, shift, 0)
        return jax.tree.map(
            lambda x: x.reshape(1, -1, *x.shape[2:]), batch.replace(image_index=index)
        )

    return [join(batch) for batch in pooled_batches()]


def prompts(rows: int) -> Batch:
    """Questions of different lengths, some with tiles."""
    rng = np.random.default_rng(2)
    samples = [_sample(rng) for _ in range(rows)]
    return collate(samples, pad_id=0, tile_side=8, tokens_per_tile=1)
