"""DeepSeek-VL2 in JAX: load a converted checkpoint and ask it questions about images."""

from vl2jax.common.errors import UserError
from vl2jax.common.version import version as _version
from vl2jax.config import VL2Config
from vl2jax.inference.completion import Completion
from vl2jax.inference.generate import generate, stream
from vl2jax.inference.loading import Model, load
from vl2jax.inference.options import GenerateOptions
from vl2jax.inference.sequence import Generation, Prompt, Sequence
from vl2jax.model.vl2 import forward
from vl2jax.processing.batch import Batch
from vl2jax.processing.collate import Sample
from vl2jax.processing.processor import Processor

__version__ = _version()
__all__ = [
    "Batch",
    "Completion",
    "GenerateOptions",
    "Generation",
    "Model",
    "Processor",
    "Prompt",
    "Sample",
    "Sequence",
    "UserError",
    "VL2Config",
    "__version__",
    "forward",
    "generate",
    "load",
    "stream",
]
