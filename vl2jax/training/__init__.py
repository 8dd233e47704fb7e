"""Training: one step, the optimizer, the paper's recipe, the working directory, metrics.

Imports everything to its left but `inference`.  Start with `train_step.py` and `run_config.py`;
the loop itself is `train.py` at the top of the repository.
"""
