"""Training: the train step, optimizers, the paper's recipe, the workdir and metrics.

Imports everything to its left except `inference`.  Start with `train_step.py` and `run_config.py`;
the training loop is in `vl2jax/programs/train.py`.
"""
