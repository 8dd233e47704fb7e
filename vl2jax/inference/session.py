"""A session with a checkpoint: prepares requests, loads the parameters, and answers.

Requests are checked before the parameters are read, so mistakes are reported without delay.
"""

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
from vl2jax.inference.options import seed_of_answer
from vl2jax.inference.request import Request
from vl2jax.inference.sequence import Generation, Prompt, Sequence
from vl2jax.model.vl2 import abstract_params
from vl2jax.ops.platform import default_device
from vl2jax.parallel.sharding import mesh_to_text
from vl2jax.processing.collate import Sample
from vl2jax.processing.processor import Processor

_REQUEST_OPTIONS = ("max_new_tokens", "seed", "n")  # per request; the others are for the engine


class Session:
    """Prepares and answers requests with one checkpoint.

    Attributes:
      processor: the processor of the checkpoint.
      exif: whether images are rotated as their EXIF orientation says.
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
        """Reads everything of a checkpoint except its parameters.

        Args:
          path: a model directory, see `read_model_dir`.
          dtype: "bfloat16" or "float32"; None: as stored.
          mesh: mesh over which the parameters are sharded; None: all on the default device.
          quantize: see `vl2jax.load`.
          crop, exif: see `Processor.sample`.
          **options: options of generation, see `vl2jax.stream`.  `max_new_tokens` and `chunk_size`
            are limited to `max_position_embeddings`.

        Raises:
          UserError: the path is not a model directory, or its files do not match.
        """
        self._directory = read_model_dir(path)
        self._dtype = dtype or self._directory.dtype
        self._mesh, self._quantize = mesh, quantize
        self._crop, self.exif = crop, exif
        self._model: Model | None = None
        self._engines: dict[tuple[int, bool], Engine] = {}
        self.processor = Processor.from_dir(self._directory.path, self._directory.config)
        self._limit = self._directory.config.decoder.max_position_embeddings
        # Larger values mean the same as the limit itself.
        most = {"max_new_tokens": self._limit, "chunk_size": self._limit}
        self._options = options | {k: min(options[k], most[k]) for k in most if k in options}

    def prepare(self, request: Request) -> Sample:
        """Converts a request to tokens and image tiles, without the parameters.

        Raises:
          UserError: the conversation or an image is invalid, or the prompt leaves no room for an
            answer.
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
        """Loads the parameters at the first call; reports their number and size on stderr."""
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
        """Reports on stderr how much memory a batch of `rows` rows needs at most; loads nothing."""
        parameters, cache = self._describe(), rows * self._limit * self._cache_bytes()
        print(
            f"{rows} {'row' if rows == 1 else 'rows'} of {self._limit} tokens: cache"
            f" {human_bytes(cache)}, with the parameters {human_bytes(parameters + cache)};"
            " activations come on top",
            file=sys.stderr,
        )

    def _cache_bytes(self) -> float:
        """Bytes of the cache per token."""
        config, dtype = self._directory.config, jnp.dtype(self._dtype)
        return cache_bytes(config, dtype, rows=1, slots=self._limit) / self._limit

    def _describe(self) -> int:
        """Describes the checkpoint on stderr; returns the bytes of its parameters."""
        config, dtype = self._directory.config, jnp.dtype(self._dtype)
        size = sum(math.prod(s) for s in flat_shapes(abstract_params(config)).values())
        nbytes = parameter_bytes(config, dtype, self._quantize)
        kind = dtype.name if self._quantize is None else f"{dtype.name} and {self._quantize}"
        mesh = self._mesh
        device = default_device() if mesh is None else mesh.devices.flat[0]
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

    def engine(self, rows: int = 1, *, compare: bool = False) -> Engine:
        """Returns the engine with `rows` batch rows, made at the first call.

        With one row it keeps the caches of conversations.  With one row, and if asked to, it
        compares prompts across processes.
        """
        key = rows, compare or rows == 1
        if key not in self._engines:
            model = self.load()
            self._engines[key] = Engine(
                *(model.config, model.params),
                rows=rows,
                tokenizer=self.processor.tokenizer,
                keep_turns=rows == 1,
                check_prompts_equal=key[1],
                **{k: v for k, v in self._options.items() if k not in _REQUEST_OPTIONS},
            )
        return self._engines[key]

    def rows(self, engine: Engine, sample: Sample) -> list[Sequence]:
        """Makes the sequences for `engine.run` from a prepared request: one, or `n`."""
        options = {k: v for k, v in self._options.items() if k in _REQUEST_OPTIONS}
        seed, n = options.pop("seed", 0), options.pop("n", 1)
        engine.check_answers(n)
        prompt = self.prompt(sample)
        return [engine.row(prompt, seed=seed_of_answer(seed, i), **options) for i in range(n)]

    def prompt(self, sample: Sample) -> Prompt:
        """Converts a prepared request to a `Prompt`."""
        size = self._directory.config.tokens_per_tile
        return Prompt(sample.tokens, sample.image_index, sample.tiles, size)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that an answer depends on, except the request."""
        kind = {"ckpt": str(self._directory.address), "dtype": self._dtype}
        if self._quantize is not None:
            kind["quantize"] = self._quantize
        return kind | {"crop": self._crop, "exif": self.exif} | self._options

    def answer(self, sample: Sample, show: Callable[[str], None]) -> Generation:
        """Answers one request, once.

        Args:
          sample: a prepared request.
          show: called with each new piece of the answer's text.
        """
        engine = self.engine()
        row = self.rows(engine, sample)[0]
        for events in engine.run([row]):
            for _, fresh in events:
                show(fresh)
        return row.result()

    def answers(self, sample: Sample, batch_size: int) -> list[Generation]:
        """Gives the `n` answers to one request.

        Args:
          sample: a prepared request.
          batch_size: maximum number of answers that are generated at the same time.
        """
        engine = self.engine(min(batch_size, self._options.get("n", 1)), compare=True)
        rows = self.rows(engine, sample)
        for _ in engine.run(rows):
            pass
        return [row.result() for row in rows]
