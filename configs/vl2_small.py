"""DeepSeek-VL2-Small (16.1 B parameters): the paper's recipe, stage by stage.

    python train.py --config=configs/vl2_small.py:align --config.init_from=CKPT \\
        --config.data.train=captions.json
    python train.py --config=configs/vl2_small.py:pretrain \\
        --config.init_from=runs/vl2_small-align \\
        --config.data.train=pictures.jsonl=0.7,text.jsonl=0.3
    python train.py --config=configs/vl2_small.py:sft --config.init_from=runs/vl2_small-pretrain \\
        --config.data.train=conversations.jsonl
"""

from vl2jax.training.recipe import paper_run


def get_config(stage: str = "sft"):
    return paper_run("vl2_small", stage)
