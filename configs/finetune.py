"""Fine-tunes all parameters of a converted checkpoint of any size on your conversations.

Command:

    python train.py --config=configs/finetune.py --config.init_from=ckpt/tiny \\
        --config.data.train=conversations.json --workdir=runs/mine

Device: one or several accelerators; parameters and optimizer state are sharded over all of them.
Memory: 12 bytes per parameter for float32 parameters and the two moments of AdamW, and gradients
and activations.  With `--config.compute.param_dtype=bfloat16` it is 10 bytes, and 6 if
`--config.optim.moments_dtype=bfloat16`, too.  A dry run (`--config.dry_run=True`) prints the bytes
on each device.
Time: 1000 steps of 8 rows of 4096 tokens; the time per step depends on model and device.
Expected result: a working directory that `sample.py` and `eval.py` accept as a model; the loss on
your conversations is in its `metrics.jsonl`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the run configuration."""
    config = ml_collections.ConfigDict()
    config.name = "finetune"
    config.model = {}  # the architecture of `init_from`
    config.init_from = ""
    config.tokenizer = ""
    config.seed = 0
    config.steps = 1000
    config.log_every = 0
    config.profile = ""
    config.dry_run = False
    config.batch = dict(rows=8, length=4096, tiles=80, segments=16, microbatches=8)
    config.data = dict(
        train="",
        heldout="",
        images_root="",
        supervise="answers",
        on_error="raise",
        too_long="raise",
        max_skipped=0.5,
        skip_batches="",
        threads=4,
        workers=0,
        prefetch=2,
        shards=0,
        preview=0,
    )
    config.optim = dict(
        lr=2e-5,
        algorithm="adamw",
        schedule="cosine",
        warmup_steps=30,
        final_lr_fraction=0.1,
        weight_decay=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        clip_norm=1.0,
        moments_dtype="float32",
        lr_multipliers=dict(vision=0.1),
        frozen=(),
    )
    config.balance = dict(aux_loss_alpha=0.001, bias_update_step=0.0)
    config.compute = dict(
        dtype="bfloat16",
        param_dtype="float32",
        remat="dots",
        moe_implementation="auto",
        ops="",
        loss_chunk=256,
    )
    config.mesh = dict(data=1, fsdp=-1, expert=1, tensor=1)
    config.checkpoint = dict(every=200, keep=2, keep_every=0)
    config.eval = dict(every=100, batches=4)
    return config
