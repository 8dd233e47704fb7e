"""Loads a model directory for inference."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, Unpack

import jax

from vl2jax.checkpoints.model_dir import flat_shapes, load_params, read_model_dir
from vl2jax.config import VL2Config
from vl2jax.inference.generate import generate, stream
from vl2jax.inference.options import GenerateOptions, has_options_of, read_dtype
from vl2jax.inference.sequence import Generation, Sequence
from vl2jax.model.quantization import check_kind
from vl2jax.model.vl2 import abstract_params, forward
from vl2jax.ops.matmul import Int8
from vl2jax.parallel.sharding import param_shardings
from vl2jax.processing.batch import Batch
from vl2jax.processing.processor import Processor


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
      config: architecture.
      params: variables, `{"params": ..., "router": ...}`.
      processor: converts conversations and images to a `Batch`.
    """

    config: VL2Config
    params: Any
    processor: Processor

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters in memory."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    @property
    def size(self) -> int:
        """Number of parameters, without the scales of int8 weights."""
        leaves = jax.tree.leaves(self.params, is_leaf=lambda x: isinstance(x, Int8))
        return sum(leaf.size for leaf in leaves)

    def forward(
        self, batch: Batch, *, dtype: Any = None, moe_implementation: str = "blocked"
    ) -> jax.Array:
        """Computes the logits of every position, float32[B, T, vocab]; see `vl2jax.forward`."""
        dtype = None if dtype is None else read_dtype("dtype", dtype)
        return forward(
            *(self.config, self.params, batch), dtype=dtype, moe_implementation=moe_implementation
        )

    @has_options_of(stream)
    def generate(self, batch: Batch, **options: Unpack[GenerateOptions]) -> list[Generation]:
        """Generates an answer for each row of a batch; see `vl2jax.generate`.

        The tokenizer is that of the processor, so answers have a text.
        """
        return generate(self.config, self.params, batch, **self._with_tokenizer(options))

    @has_options_of(stream)
    def stream(
        self, batch: Batch, **options: Unpack[GenerateOptions]
    ) -> Iterator[tuple[list[Sequence], list[str]]]:
        """Generates like `generate`, and yields the text so far; see `vl2jax.stream`."""
        return stream(self.config, self.params, batch, **self._with_tokenizer(options))

    def _with_tokenizer(self, options: GenerateOptions) -> GenerateOptions:
        return {"tokenizer": self.processor.tokenizer, **options}


def load(
    path: str | os.PathLike,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    quantize: str | None = None,
    on_leaf: Callable[[str, int], None] | None = None,
) -> Model:
    """Loads a model, one parameter at a time.

    Args:
      path: a directory written by `convert.to_jax`, a training workdir (its newest checkpoint), or
        one of its checkpoints (WORKDIR/checkpoints/500).
      dtype: "bfloat16", "float32" or a NumPy dtype of these; None: as stored.  The router's
        correction bias is always float32.
      mesh: mesh over which the parameters are sharded by `parallel.sharding.PARAM_RULES`; each
        device reads its shard.  None: everything is on the default device.
      quantize: "int8": most weights become int8 with a scale per output channel, see
        `vl2jax.model.quantization`; the whole model is never in memory in its stored dtype.  Such a
        model is for `forward` and `generate`, not for training.  None: no quantisation.
      on_leaf: called with the path and the bytes of each parameter once it is loaded.

    Returns:
      The model, with its parameters on their devices.

    Raises:
      UserError: the path is not a model directory, the parameters do not match its configuration,
        the tokenizer does not match the vocabulary, the mesh does not divide the sizes, or `dtype`
        or `quantize` is unknown.
    """
    check_kind(quantize)
    directory = read_model_dir(path)
    dtype = read_dtype("dtype", directory.dtype if dtype is None else dtype)
    processor = Processor.from_dir(directory.path, directory.config)
    abstract = abstract_params(directory.config)
    params = load_params(
        directory.params,
        flat_shapes(abstract),
        dtype=dtype,
        shardings=None if mesh is None else param_shardings(mesh, abstract),
        quantize=quantize,
        on_leaf=on_leaf,
    )
    return Model(directory.config, params, processor)
