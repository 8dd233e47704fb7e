"""Trains a small model with every structural feature of DeepSeek-VL2 on synthetic images.

Commands:

    python train.py --config=configs/tiny.py
    python sample.py --ckpt runs/tiny --image examples/question.png \\
        --prompt "How many shapes do you see?"
    python eval.py --ckpt runs/tiny --data synthetic

Device, memory, time: two CPU cores, 1.8 GB, 15 to 18 minutes.
Expected result: on 400 questions about colours, shapes, counts and digits in held-out images, 95%
of the answers are correct; boxes vary from run to run (benchmarks/results.md).
"""

import ml_collections

from vl2jax.config import AdaptorConfig, DecoderConfig, VisionConfig, VL2Config

SIDE = 76  # 5 patches of 14 pixels and 6 pixels left over, as 384 is 27 patches and 6 pixels


def architecture() -> VL2Config:
    """Returns the architecture.

    It has an odd patch grid, tiling, MLA, a dense layer, shared and routed experts, and a sigmoid
    router with correction bias.
    """
    decoder = DecoderConfig(
        vocab_size=1536,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=2,
        n_routed_experts=12,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.06,
        torch_dtype="float32",
    )
    shapes = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
    return VL2Config(
        vision=VisionConfig(image_size=SIDE, patch_size=14, width=96, layers=2, heads=4),
        adaptor=AdaptorConfig(input_dim=96, n_embed=decoder.hidden_size),
        decoder=decoder,
        candidate_resolutions=tuple((wide * SIDE, high * SIDE) for wide, high in shapes),
        torch_dtype="float32",
    )


def get_config() -> ml_collections.ConfigDict:
    """Returns the run configuration."""
    config = ml_collections.ConfigDict()
    config.name = "tiny"
    config.model = architecture().to_hf()
    config.init_from = ""
    config.tokenizer = ""
    config.seed = 0
    config.steps = 4800
    config.log_every = 0
    config.profile = ""
    config.dry_run = False
    config.batch = dict(rows=6, length=240, tiles=36, segments=8, microbatches=1)
    config.data = dict(
        train="synthetic",
        heldout="synthetic",
        images_root="",
        supervise="answers",
        on_error="raise",
        too_long="raise",
        max_skipped=0.5,
        skip_batches="",
        threads=1,
        workers=0,
        prefetch=4,
        shards=0,
        preview=0,
    )
    config.optim = dict(
        lr=3e-3,
        algorithm="muon",
        schedule="cosine",
        warmup_steps=50,
        final_lr_fraction=0.02,
        weight_decay=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        clip_norm=1.0,
        moments_dtype="float32",
        lr_multipliers={"vision/pos_embed": 0.1},
        frozen=(),
    )
    config.balance = dict(aux_loss_alpha=0.0001, bias_update_step=0.003)
    config.compute = dict(
        dtype="float32",
        param_dtype="float32",
        remat="dots",
        moe_implementation="blocked",
        ops="",
        loss_chunk=256,
    )
    config.mesh = dict(data=-1, fsdp=1, expert=1, tensor=1)
    config.checkpoint = dict(every=500, keep=2, keep_every=0)
    config.eval = dict(every=250, batches=4)
    return config
