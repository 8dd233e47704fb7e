"""Configurations: the architecture with its defaults and checks, and the released sizes.

Reads and writes Hugging Face's `config.json`, and reads `processor_config.json`.  Imports only
`common`.  Start with `architecture.py`; `schema.py` reads the JSON, `checks.py` validates it.
"""

from vl2jax.config.architecture import (
    PRESETS,
    RELEASED_RESOLUTIONS,
    AdaptorConfig,
    DecoderConfig,
    LayerRun,
    RopeScaling,
    VisionConfig,
    VL2Config,
    base,
    required,
    small,
    tiny,
)
from vl2jax.config.schema import ConfigError

__all__ = [
    "PRESETS",
    "RELEASED_RESOLUTIONS",
    "AdaptorConfig",
    "ConfigError",
    "DecoderConfig",
    "LayerRun",
    "RopeScaling",
    "VL2Config",
    "VisionConfig",
    "base",
    "required",
    "small",
    "tiny",
]
