"""Models for benchmarks: about 93 million parameters, with the structure of the released ones."""

import argparse
import dataclasses

import numpy as np

from vl2jax.config import (
    RELEASED_RESOLUTIONS,
    AdaptorConfig,
    DecoderConfig,
    VisionConfig,
    VL2Config,
)
from vl2jax.processing.batch import TEXT, Batch
from vl2jax.processing.image import image_layout

ATTENTIONS = ("mla", "mha")
DTYPES = ("float32", "bfloat16")


def case_parser(description: str) -> argparse.ArgumentParser:
    """Makes a parser with the flags that select the cases of a benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=ATTENTIONS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def medium_config(attention: str = "mla") -> VL2Config:
    """Vision tower: 6 layers of width 384.  Decoder: 8 layers of width 512, 16 experts, top 4."""
    decoder = DecoderConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        moe_intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_shared_experts=2,
        n_routed_experts=16,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        max_position_embeddings=4096,
        q_lora_rank=None,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    if attention == "mha":
        latent = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        decoder = dataclasses.replace(
            decoder, use_mla=False, kv_lora_rank=None, **dict.fromkeys(latent, 0)
        )
    return VL2Config(
        vision=VisionConfig(
            model_name="siglip_so400m_patch14_384",
            patch_size=14,
            width=384,
            layers=6,
            heads=6,
            mlp_ratio=3.7362,
        ),
        adaptor=AdaptorConfig(input_dim=384, n_embed=512),
        decoder=decoder,
        tile_tag="2D",
        candidate_resolutions=RELEASED_RESOLUTIONS,
    )


def training_batch(
    config: VL2Config, rows: int = 2, length: int = 512, with_images: bool = True
) -> Batch:
    """Makes a batch of random tokens; text tokens are supervised.

    Args:
      config: architecture.
      rows: number of rows.
      length: tokens per row.
      with_images: whether each row has an image of 1x1 tiles near its start (421 tokens, two
        views).
    """
    random = np.random.default_rng(0)
    side, shape = config.vision.image_size, (rows, length)
    image_index = np.full(shape, TEXT, np.int32)
    if with_images:
        for row in range(rows):
            layout = image_layout(1, 1, config.tile_grid, first_slot=2 * row)
            image_index[row, 1 : 1 + len(layout)] = layout
    return Batch(
        tiles=random.integers(0, 256, (2 * rows * with_images, side, side, 3), dtype=np.uint8),
        tokens=random.integers(2, config.decoder.vocab_size, shape, dtype=np.int32),
        image_index=image_index,
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segment_ids=np.ones(shape, np.int32),
        loss_mask=image_index == TEXT,
    )
