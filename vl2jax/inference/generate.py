"""Answers to prompts, whole or as they come; the work is done in `engine.py`.

Axis legend: B rows.
"""

from collections import abc
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.inference.engine import Engine
from vl2jax.inference.sequence import Generation, Sequence, prompts_of
from vl2jax.processing.batch import Batch


def generate(config: VL2Config, params, batch: Batch, **options) -> list[Generation]:
    """Answers every row of a batch; a row's answer does not depend on the others.

    Args:
      config: architecture.
      params: variables of the model, as `vl2jax.load` gives; the mesh that they lie on is used.
      batch: prompts, one sequence per row, padded on the right (`processor(..., inference=True)`).
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
    """Like `generate`, as an iterator over steps: the first tokens of some rows, or a burst.

    Args:
      config, params, batch: see `generate`.
      max_new_tokens: at most so many tokens; never beyond `max_position_embeddings`.
      temperature, top_p, top_k, repetition_penalty: see `SamplingParams`. The penalty counts the
        ids of prompt and answer, `<image>` among them, but no padding.
      stop: strings that end an answer; needs a tokenizer.
      seed: of the random draws, one for all rows or one per row. A row's draws depend on its own
        seed alone.
      eos_token_id: ids that end an answer; None: that of the tokenizer, else the configuration.
      tokenizer: turns tokens to text; None: no text, no stop strings.
      chunk_size: prefill so many tokens at a time, to save memory; 0: all at once.
      dtype: of the computation; None: that of the parameters.
      cache_dtype: of the cache; None: `dtype`.

    Yields:
      The rows so far, and for each row the text that the step added (empty without a tokenizer).

    Raises:
      UserError: options out of range, a batch that is not one right-padded prompt per row, or a
        prompt that leaves no room for an answer.
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
    prompts = prompts_of(batch, lengths, config.tokens_per_tile)
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
    """int[B] lengths of the prompts, after checking how they are padded."""
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
    """One seed per row, from one for all rows or one each."""
    seeds = [seed] * rows if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise UserError(f"seed must be one number or one per row ({rows}), got {len(seeds)}")
    return seeds
