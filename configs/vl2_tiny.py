"""DeepSeek-VL2-Tiny (3.4 B parameters): the paper's recipe in three stages (Table 2).

Command, stage by stage (`sft` if no stage is given):

    python train.py --config=configs/vl2_tiny.py:align --config.init_from=CKPT \\
        --config.data.train=captions.json
    python train.py --config=configs/vl2_tiny.py:pretrain \\
        --config.init_from=runs/vl2_tiny-align \\
        --config.data.train=pictures.jsonl=0.7,text.jsonl=0.3
    python train.py --config=configs/vl2_tiny.py:sft --config.init_from=runs/vl2_tiny-pretrain \\
        --config.data.train=conversations.jsonl

Device, memory, time: 8 TPU v6e chips with `--config.mesh.fsdp=8`:
17.4 GiB on each chip and at least 1.14 s per step of `sft` (planned in docs/scaling.md, not run).
A dry run (`--config.dry_run=True`) prints steps and memory.  `python -m vl2jax.plan` computes the
numbers for other slices.

Expected result: no run of this size has been made, and the paper's training data are not public, so
there are no scores to compare with.
"""

from vl2jax.training.recipe import paper_run


def get_config(stage: str = "sft"):
    """Returns the run configuration of a stage: "align", "pretrain" or "sft"."""
    return paper_run("vl2_tiny", stage)
