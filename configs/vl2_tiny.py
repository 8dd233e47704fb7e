"""DeepSeek-VL2-Tiny (3.4 B parameters): the paper's recipe, stage by stage.

    python train.py --config=configs/vl2_tiny.py:align --config.init_from=CKPT \\
        --config.data.train=captions.json
    python train.py --config=configs/vl2_tiny.py:pretrain \\
        --config.init_from=runs/vl2_tiny-align \\
        --config.data.train=pictures.jsonl=0.7,text.jsonl=0.3
    python train.py --config=configs/vl2_tiny.py:sft --config.init_from=runs/vl2_tiny-pretrain \\
        --config.data.train=conversations.jsonl
"""

from vl2jax.training.recipe import paper_run


def get_config(stage: str = "sft"):
    return paper_run("vl2_tiny", stage)
