"""What a model is: names, defaults and checks of an architecture, and the released sizes.

Reads and writes the Hugging Face `config.json` and `processor_config.json`.  Imports `common`
alone.  Start with `architecture.py`; `schema.py` reads, `checks.py` refuses.
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
    given,
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
    "given",
    "small",
    "tiny",
]
