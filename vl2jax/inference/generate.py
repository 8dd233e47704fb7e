"""Generates answers for a batch of prompts, whole or streamed, with the engine of `engine.py`.

Axis legend: B rows.
"""

from collections import abc
from collections.abc import Iterator
from typing import Any, Unpack

import numpy as np

from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.inference.engine import Engine
from vl2jax.inference.options import (
    GenerateOptions,
    has_options_of,
    read_n,
    read_seeds,
    read_whole,
    seed_of_answer,
)
from vl2jax.inference.sequence import Generation, Sequence, split_batch
from vl2jax.processing.batch import Batch


def stream(
    config: VL2Config,
    params: Any,
    batch: Batch,
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: str | abc.Sequence[str] | None = (),
    seed: int | abc.Sequence[int] | np.ndarray = 0,
    n: int = 1,
    eos_token_id: int | abc.Sequence[int] | None = None,
    tokenizer: Any = None,
    batch_size: int = 8,
    chunk_size: int = 0,
    dtype: Any = None,
    cache_dtype: Any = None,
) -> Iterator[tuple[list[Sequence], list[str]]]:
    """Generates like `generate`, and yields after each prefill and each burst of tokens.

    The options are checked when it is called, before the first answer is asked for.  Numbers may be
    those of Python or NumPy.

    Args:
      config, params, batch: see `generate`.
      max_new_tokens: maximum number of tokens per answer.  Prompt and answer together are limited
        to `max_position_embeddings`.
      temperature, top_p, top_k, repetition_penalty: see `SamplingParams`.  The penalty applies to
        all ids of prompt and answer, including `<image>`, but not to padding.
      stop: a string that ends an answer, or several; they need a tokenizer.
      seed: seed of the random draws, of at most 64 bits, one for all rows or one per row.  The
        draws of a row depend only on its seed.
      n: number of answers to each prompt, up to `MAX_N`.  Their seeds are made from the prompt's,
        which the first one has.  More than one need a temperature.
      eos_token_id: ids that end an answer; None: the id of the tokenizer, without a tokenizer that
        of the configuration.
      tokenizer: decodes tokens to text; None: no text and no stop strings.
      batch_size: maximum number of answers that are generated at the same time.  The others wait on
        the host, and enter the device's batch when an answer is finished.
      chunk_size: number of tokens that are prefilled at a time, to save memory; 0: all at once.
      dtype: dtype of the computation, a name or a dtype of `DTYPES`; None: that of the parameters.
      cache_dtype: dtype of the cache, likewise; None: `dtype`.

    Yields:
      The sequences so far, n for each row, and for each the text that was added (empty without a
      tokenizer).

    Raises:
      UserError: an option is out of range, the batch does not have one right-padded prompt per row,
        or a prompt leaves no room for an answer.
    """
    lengths = _prompt_lengths(batch)
    n, seeds = read_n(n), read_seeds(seed, len(lengths))
    engine = Engine(
        *(config, params),
        rows=min(read_whole("batch_size", batch_size, 1), max(1, n * len(lengths))),
        tokenizer=tokenizer,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stop=stop,
        eos_token_id=eos_token_id,
        chunk_size=chunk_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    engine.check_answers(n)
    read_whole("max_new_tokens", max_new_tokens, 1)  # also if there is no row
    rows = [
        engine.row(prompt, max_new_tokens, seed_of_answer(one, number))
        for prompt, one in zip(
            split_batch(batch, lengths, config.tokens_per_tile), seeds, strict=True
        )
        for number in range(n)
    ]
    return _run(engine, rows)


def _run(engine: Engine, rows: list[Sequence]) -> Iterator[tuple[list[Sequence], list[str]]]:
    number = {id(row): i for i, row in enumerate(rows)}
    for events in engine.run(rows):
        fresh = [""] * len(rows)
        for row, text in events:
            fresh[number[id(row)]] = text
        yield rows, fresh


@has_options_of(stream)
def generate(
    config: VL2Config, params: Any, batch: Batch, **options: Unpack[GenerateOptions]
) -> list[Generation]:
    """Generates an answer for each row of a batch; it does not depend on the other rows.

    Args:
      config: architecture.
      params: variables of the model, as `vl2jax.load` returns them.  The computation runs on their
        mesh.
      batch: prompts, one per row, padded on the right, as a `Processor` returns them; it may have
        no rows.
      **options: see `stream`.

    Returns:
      One `Generation` per row, or `n` of them, in the order of the rows.  If the logits of a row
      are not finite, its `finish_reason` is "error"; the other rows are answered.

    Raises:
      UserError: see `stream`.
    """
    rows: list[Sequence] = []
    for rows, _ in stream(config, params, batch, **options):  # noqa: B007  # the last counts
        pass
    return [row.result() for row in rows]


def _prompt_lengths(batch: Batch) -> np.ndarray:
    """Lengths of the prompts, int[B]; checks that rows are padded on the right."""
    segments, positions = np.asarray(batch.segment_ids), np.asarray(batch.positions)
    lengths = (segments > 0).sum(axis=1)
    expected = np.arange(segments.shape[1])[None] < lengths[:, None]
    if not np.array_equal(segments, expected) or (
        np.where(expected, positions - np.arange(segments.shape[1]), 0).any()
    ):
        raise UserError(
            "generation needs one prompt per row, padded on the right, with positions from 0;"
            " got packed or left-padded rows"
        )
    return lengths
