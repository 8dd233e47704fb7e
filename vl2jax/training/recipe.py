"""Run configurations of the paper's training recipe (Table 2), for three sizes and three stages.

`configs/vl2_tiny.py`, `vl2_small.py` and `vl2_base.py` use them.
"""

import math

import ml_collections

from vl2jax.common.errors import UserError
from vl2jax.config import PRESETS

STAGES = ("align", "pretrain", "sft")
LENGTH = 4096  # tokens per row in all stages

# From Table 2.  The paper does not give the following; they are choices of this project: warm-up of
# 2000 steps for the step schedule (as in DeepSeek-V2) and of 3% of all steps for the other
# schedules, cosine decay to 0, and which parameters have weight decay.
#                        align    pretrain  sft
TABLE_2 = {
    "vl2_tiny": {
        "lr": (5.4e-4, 5.4e-4, 3.0e-5),
        "tokens": (2.0e9, 798.5e9, 19.5e9),
        "rows": (256, 2304, 64),
        "aux_loss_alpha": (0.001, 0.001, 0.001),
        "bias_update_step": (0.0, 0.0, 0.0),
        "moments_dtype": "float32",
    },
    "vl2_small": {
        "lr": (4.2e-4, 4.2e-4, 1.4e-5),
        "tokens": (2.0e9, 808.9e9, 20.0e9),
        "rows": (256, 2304, 64),
        "aux_loss_alpha": (0.001, 0.001, 0.001),
        "bias_update_step": (0.0, 0.0, 0.0),
        "moments_dtype": "float32",
    },
    "vl2_base": {
        "lr": (4.5e-4, 4.5e-4, 2.0e-5),
        "tokens": (2.0e9, 796.5e9, 19.5e9),
        "rows": (256, 3360, 64),
        "aux_loss_alpha": (0.0001, 0.0001, 0.0001),
        "bias_update_step": (0.0, 0.001, 0.0),
        "moments_dtype": "bfloat16",
    },
}
SCHEDULE = ("cosine", "step", "constant")
FROZEN = (("decoder",), (), ())
PACKED = (False, True, True)
SUPERVISE = ("text", "text", "answers")
WARMUP = (0.03, None, 0.03)  # fraction of all steps; None: 2000 steps
# Choices of this project: tile slots per row, and rows per microbatch.  An image has 2 to 10 tiles.
TILES_PER_ROW = (6, 10, 10)
MICROBATCH_ROWS = (256, 256, 64)


def paper_run(size: str, stage: str) -> ml_collections.ConfigDict:
    """Makes the configuration of one stage; the user sets `data.train` and `init_from`.

    Args:
      size: a key of `TABLE_2`.
      stage: one of `STAGES`.

    Raises:
      UserError: the stage does not exist.
    """
    if stage not in STAGES:
        raise UserError(f"{size} has the stages {', '.join(STAGES)}, got {stage!r}")
    row, i = TABLE_2[size], STAGES.index(stage)
    rows = row["rows"][i]
    steps = round(row["tokens"][i] / (rows * LENGTH))
    microbatches = math.ceil(rows / MICROBATCH_ROWS[i])
    config = ml_collections.ConfigDict()
    config.name = f"{size}-{stage}"
    config.model = PRESETS[size.removeprefix("vl2_")]().to_hf()
    config.init_from = ""
    config.tokenizer = ""
    config.seed = 0
    config.steps = steps
    config.log_every = 0
    config.profile = ""
    config.dry_run = False
    config.batch = dict(
        rows=rows,
        length=LENGTH,
        tiles=TILES_PER_ROW[i] * rows,
        segments=32 if PACKED[i] else 1,
        microbatches=microbatches,
    )
    config.data = dict(
        train="",
        heldout="",
        images_root="",
        supervise=SUPERVISE[i],
        on_error="skip",
        too_long="raise",
        max_skipped=0.5,
        skip_batches="",
        threads=16,
        workers=0,
        prefetch=2,
        shards=0,
        preview=0,
    )
    config.optim = dict(
        lr=row["lr"][i],
        algorithm="adamw",
        schedule=SCHEDULE[i],
        warmup_steps=2000 if WARMUP[i] is None else round(WARMUP[i] * steps),
        final_lr_fraction=0.0,
        weight_decay=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        clip_norm=1.0,
        moments_dtype=row["moments_dtype"],
        lr_multipliers=dict(vision=0.1),
        frozen=FROZEN[i],
    )
    config.balance = dict(
        aux_loss_alpha=row["aux_loss_alpha"][i], bias_update_step=row["bias_update_step"][i]
    )
    config.compute = dict(
        dtype="bfloat16",
        param_dtype="float32",
        remat="full",
        moe_implementation="auto",
        ops="",
        loss_chunk=1024,
    )
    config.mesh = dict(data=1, fsdp=-1, expert=1, tensor=1)
    config.checkpoint = dict(every=500, keep=2, keep_every=10_000)
    config.eval = dict(every=500, batches=4)
    return config
