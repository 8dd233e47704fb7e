"""DeepSeek-VL2 in JAX: load a converted checkpoint, ask it about pictures."""

from vl2jax.api import Model, load
from vl2jax.batch import Batch
from vl2jax.config import VL2Config
from vl2jax.errors import UserError
from vl2jax.generate import Generation, generate, stream
from vl2jax.model import forward
from vl2jax.processor import Processor

__all__ = [
    "Batch",
    "Generation",
    "Model",
    "Processor",
    "UserError",
    "VL2Config",
    "forward",
    "generate",
    "load",
    "stream",
]
