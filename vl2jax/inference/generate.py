"""Generates answers for a batch of prompts, whole or streamed, with the engine of `engine.py`.

Axis legend: B rows.
"""

from collections import abc
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.inference.engine import Engine
from vl2jax.inference.sequence import Generation, Sequence, split_batch
from vl2jax.processing.batch import Batch


def generate(config: VL2Config, params, batch: Batch, **options) -> list[Generation]:
    """Generates an answer for each row of a batch; it does not depend on the other rows.

    Args:
      config: architecture.
      params: variables of the model, as `vl2jax.load` returns them.  The computation runs on their
        mesh.
      batch: prompts, one per row, padded on the right, as a `Processor` returns them.
      **options: see `stream`.

    Returns:
      One `Generation` per row.
    """
    *_, (rows, _) = stream(config, params, batch, **options)
    return [row.result() for row in rows]


def stream(
    config: VL2Config,
    params,
    batch: Batch,
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: abc.Sequence[str] = (),
    seed: int | abc.Sequence[int] = 0,
    eos_token_id: int | abc.Sequence[int] | None = None,
    tokenizer=None,
    chunk_size: int = 0,
    dtype: jnp.dtype | None = None,
    cache_dtype: jnp.dtype | None = None,
) -> Iterator[tuple[list[Sequence], list[str]]]:
    """Generates like `generate`, and yields after each prefill and each burst of tokens.

    Args:
      config, params, batch: see `generate`.
      max_new_tokens: maximum number of tokens per answer.  Prompt and answer together are limited
        to `max_position_embeddings`.
      temperature, top_p, top_k, repetition_penalty: see `SamplingParams`.  The penalty applies to
        all ids of prompt and answer, including `<image>`, but not to padding.
      stop: strings that end an answer; they need a tokenizer.
      seed: seed of the random draws, one for all rows or one per row.  The draws of a row depend
        only on its seed.
      eos_token_id: ids that end an answer; None: the id of the tokenizer, without a tokenizer that
        of the configuration.
      tokenizer: decodes tokens to text; None: no text and no stop strings.
      chunk_size: number of tokens that are prefilled at a time, to save memory; 0: all at once.
      dtype: dtype of the computation; None: that of the parameters.
      cache_dtype: dtype of the cache; None: `dtype`.

    Yields:
      The sequences so far, and for each the text that was added (empty without a tokenizer).

    Raises:
      UserError: an option is out of range, the batch does not have one right-padded prompt per row,
        or a prompt leaves no room for an answer.
    """
    lengths = _prompt_lengths(batch)
    engine = Engine(
        *(config, params),
        rows=len(lengths),
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
    prompts = split_batch(batch, lengths, config.tokens_per_tile)
    seeds = _seeds(seed, len(prompts))
    rows = [
        engine.row(prompt, max_new_tokens, one) for prompt, one in zip(prompts, seeds, strict=True)
    ]
    number = {id(row): i for i, row in enumerate(rows)}
    for events in engine.run(rows):
        fresh = [""] * len(rows)
        for row, text in events:
            fresh[number[id(row)]] = text
        yield rows, fresh


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


def _seeds(seed: int | abc.Sequence[int], rows: int) -> list[int]:
    """Expands `seed` to one seed per row."""
    seeds = [seed] * rows if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise UserError(f"seed must be one number or one per row ({rows}), got {len(seeds)}")
    return seeds
