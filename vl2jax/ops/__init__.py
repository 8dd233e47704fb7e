"""Operations with more than one implementation: attention, experts, caches, products with weights.

Each folder is one operation: the function that the model calls, a plain reference, and a file per
platform.  `registry.py` chooses among them.  This is the only place that asks which platform a
program is for.  Imports `common`, `config` and `parallel`.  Start with `attention/__init__.py`.
"""
