"""A checkpoint in use: checks requests before its parameters are read, then answers them."""

import math
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vl2jax.checkpoints.footprint import cache_bytes, parameter_bytes
from vl2jax.checkpoints.model_dir import flat_shapes, read_model_dir
from vl2jax.common.errors import UserError
from vl2jax.common.progress import Progress, human_bytes
from vl2jax.inference.engine import Engine
from vl2jax.inference.loading import Model, load
from vl2jax.inference.request import Request
from vl2jax.inference.sequence import Generation, Prompt, Sequence
from vl2jax.model.vl2 import abstract_params
from vl2jax.parallel.sharding import mesh_to_text
from vl2jax.processing.collate import Sample
from vl2jax.processing.processor import Processor

_OF_A_ROW = ("max_new_tokens", "seed")  # options of a row; the others are the engine's


class Session:
    """Prepares and answers requests.

    Attributes:
      processor: of the checkpoint.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        dtype: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        quantize: str | None = None,
        crop: bool | None = None,
        exif: bool = True,
        **options: Any,
    ):
        """Reads all of a checkpoint but its parameters.

        Args:
          path: what `read_model_dir` takes.
          dtype: "bfloat16" or "float32"; None: as stored.
          mesh: that the parameters are split over; None: the default device has them all.
          quantize: see `vl2jax.load`.
          crop, exif: see `Processor.sample`.
          **options: see `vl2jax.stream`.

        Raises:
          UserError: not such a directory, or its parts do not fit each other.
        """
        self._directory = read_model_dir(path)
        self._dtype = dtype or self._directory.dtype
        self._mesh, self._quantize = mesh, quantize
        self._crop, self.exif = crop, exif
        self._model: Model | None = None
        self._engines: dict[int, Engine] = {}
        self.processor = Processor.from_dir(self._directory.path, self._directory.config)
        self._limit = self._directory.config.decoder.max_position_embeddings
        # More than the model can hold means as much as it can hold.
        most = {"max_new_tokens": self._limit, "chunk_size": self._limit}
        self._options = options | {k: min(options[k], most[k]) for k in most if k in options}

    def prepare(self, request: Request) -> Sample:
        """Makes a request into integers and tiles; needs no parameters.

        Raises:
          UserError: anything wrong with the conversation or its images, or no room for an answer.
        """
        sample = self.processor.sample(
            request.conversation,
            request.images,
            crop=self._crop,
            exif=self.exif,
            add_placeholders=request.add_placeholders,
        )
        if len(sample) >= self._limit:
            raise UserError(
                f"the prompt has {len(sample)} tokens, which leaves no room for an answer within"
                f" max_position_embeddings {self._limit}; shorten it or give fewer images"
            )
        return sample

    def load(self) -> Model:
        """Reads the parameters, once, and says on standard error what they are and take."""
        if self._model is None:
            total = self._describe()
            with Progress("loading", total) as progress:
                self._model = load(
                    self._directory.address,
                    self._dtype,
                    self._mesh,
                    quantize=self._quantize,
                    on_leaf=lambda _, n: progress.update(n),
                )
        return self._model

    def plan(self, rows: int) -> None:
        """Says on standard error what memory so many rows need at most; nothing is loaded."""
        parameters, cache = self._describe(), rows * self._limit * self._cache_bytes()
        print(
            f"{rows} {'row' if rows == 1 else 'rows'} of {self._limit} tokens: cache"
            f" {human_bytes(cache)}, with the parameters {human_bytes(parameters + cache)};"
            " activations come on top",
            file=sys.stderr,
        )

    def _cache_bytes(self) -> float:
        """Of one token."""
        config, dtype = self._directory.config, jnp.dtype(self._dtype)
        return cache_bytes(config, dtype, rows=1, slots=self._limit) / self._limit

    def _describe(self) -> int:
        """Prints what is loaded; bytes of the parameters."""
        config, dtype = self._directory.config, jnp.dtype(self._dtype)
        size = sum(math.prod(s) for s in flat_shapes(abstract_params(config)).values())
        nbytes = parameter_bytes(config, dtype, self._quantize)
        kind = dtype.name if self._quantize is None else f"{dtype.name} and {self._quantize}"
        device, mesh = jax.devices()[0], self._mesh
        where = f"{device.platform} ({device.device_kind})"
        if mesh is not None:
            where = f"{mesh.size} x {where}, mesh {mesh_to_text(mesh)}"
        print(
            f"{self._directory.address}: {size:,} parameters, {kind},"
            f" {human_bytes(nbytes)} on {where}; cache"
            f" {human_bytes(self._cache_bytes())} a token, up to {self._limit} tokens a row",
            file=sys.stderr,
        )
        return nbytes

    def engine(self, rows: int = 1) -> Engine:
        """The engine for so many rows at a time, made once; one row keeps its turns."""
        if rows not in self._engines:
            model = self.load()
            self._engines[rows] = Engine(
                *(model.config, model.params),
                rows=rows,
                tokenizer=self.processor.tokenizer,
                keep_turns=rows == 1,
                compare_prompts=rows == 1,
                **{k: v for k, v in self._options.items() if k not in _OF_A_ROW},
            )
        return self._engines[rows]

    def row(self, engine: Engine, sample: Sample) -> Sequence:
        """A prepared request as a row for `engine.run`."""
        options = {k: v for k, v in self._options.items() if k in _OF_A_ROW}
        return engine.row(self.prompt(sample), **options)

    def prompt(self, sample: Sample) -> Prompt:
        """A prepared request as the engine takes it."""
        size = self._directory.config.tokens_per_tile
        return Prompt(sample.tokens, sample.image_index, sample.tiles, size)

    @property
    def settings(self) -> dict[str, Any]:
        """All that an answer depends on besides its request."""
        kind = {"ckpt": str(self._directory.address), "dtype": self._dtype}
        if self._quantize is not None:
            kind["quantize"] = self._quantize
        return kind | {"crop": self._crop, "exif": self.exif} | self._options

    def answer(self, sample: Sample, show: Callable[[str], None]) -> Generation:
        """Answers one sample; `show` is called with each new piece of its text."""
        engine = self.engine()
        row = self.row(engine, sample)
        for events in engine.run([row]):
            for _, fresh in events:
                show(fresh)
        return row.result()
