"""Times generation with the medium models: vision tower, prefill, decoding.

    python benchmarks/bench_generate.py [--attention mla mha] [--dtype float32 bfloat16]
        [--repeats 5] [--quantize none int8]
    python benchmarks/bench_generate.py --study context|batch|experts [--layers N]

Prints one JSON line per case, with median and best of each measurement.  The first call, which
compiles, is not counted.

`vision_tiles_per_s`: vision tower and adaptor on 4 tiles.
`prefill_tokens_per_s`: prefill of 1024 embeddings, with the cache writes.
`e2e_prefill_s`: seconds to the first token for an image of 2x1 tiles (617 tokens) and 95 tokens of
  text.
`decode_tokens_per_s_b1`, `_b8`: tokens per second of all rows, for 32 tokens after a prompt of 256,
  with batch sizes 1 and 8.
`decode_bound_b1`: tokens per second if a step took only the time to read the weights that one token
  uses, at `memory_gb_per_s`.
`memory_gb_per_s`: rate at which this machine sums a large array.
`token_mb`: MB of the weights that one token uses.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import medium
import numpy as np

from vl2jax.config import VL2Config
from vl2jax.inference.buckets import length_bucket
from vl2jax.inference.sampling import SamplingParams
from vl2jax.inference.steps import MAX_BURST, DecodeState, compiled_steps
from vl2jax.model.quantization import KINDS, quantize_tree
from vl2jax.model.vl2 import VL2, init_variables
from vl2jax.ops.compiler_options import compiler_options
from vl2jax.ops.platform import platform_of
from vl2jax.processing.batch import TEXT, Batch
from vl2jax.processing.image import image_layout

NEW, PROMPT = 32, 256


def make_params(config: VL2Config, dtype: str):
    """Random parameters in the dtype of the computation."""
    model = VL2(config, param_dtype=jnp.dtype(dtype))
    return jax.jit(lambda key: init_variables(model, key))(jax.random.key(0))


def text_batch(config: VL2Config, rows: int, length: int) -> Batch:
    """Prompts without images."""
    return medium.training_batch(config, rows, length, with_images=False)


def picture_batch(config: VL2Config) -> Batch:
    """One prompt: an image of 2x1 tiles, then 95 tokens of text."""
    layout = image_layout(2, 1, config.tile_grid)
    batch = text_batch(config, 1, len(layout) + 95)
    side = config.vision.image_size
    tiles = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    image_index = np.full(batch.tokens.shape, TEXT, np.int32)
    image_index[0, : len(layout)] = layout
    return batch.replace(tiles=tiles, image_index=image_index)


class Case:
    """A random model, and the functions to time."""

    def __init__(
        self,
        config: VL2Config,
        dtype: str,
        *,
        quantize: str | None = None,
    ):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.params = make_params(config, dtype)
        if quantize == "int8":
            self.params = jax.jit(quantize_tree)(self.params)
        self.steps = compiled_steps(config, self.dtype, platform_of(self.params))

    def vision(self, tiles: int = 4) -> Callable[[], object]:
        """Vision tower and adaptor on random tiles."""
        model, side = VL2(self.config, self.dtype), self.config.vision.image_size
        table = jax.jit(
            lambda params, x: model.apply(params, x, method=VL2.image_table),
            compiler_options=compiler_options(self.dtype),
        )
        pixels = np.random.default_rng(0).integers(0, 256, (tiles, side, side, 3), dtype=np.uint8)
        return lambda: table(self.params, pixels)

    def prefill(self, length: int = 1024, chunk: int = 0) -> Callable[[], object]:
        """Prefill of one prompt, at once or in chunks."""
        batch = text_batch(self.config, 1, length)
        return lambda: self._prefilled(batch, chunk or length)

    def picture(self) -> Callable[[], object]:
        """Vision tower, embedding and prefill of a prompt with an image."""
        batch = picture_batch(self.config)
        return lambda: self._start(batch, 0)

    def decode(
        self, rows: int, prompt: int = PROMPT, burst: int = MAX_BURST
    ) -> Callable[[], float]:
        """Returns a function that measures the seconds of `NEW` decode steps, without prefill.

        Args:
          rows: batch size.
          prompt: tokens per prompt.
          burst: decode steps per dispatch.
        """
        batch = text_batch(self.config, rows, prompt)
        nothing = jnp.asarray([-1], jnp.int32)

        def run() -> float:
            state = jax.block_until_ready(self._start(batch, NEW))
            start = time.perf_counter()
            for _ in range(NEW // burst):
                arguments = (self.params, _GREEDY, state, nothing, burst, 0)
                state, tokens = self.steps.burst(*arguments)
                np.asarray(tokens)
            return time.perf_counter() - start

        return run

    def compiled_burst(self, rows: int):
        """Compiles the program of `decode`."""
        state = jax.eval_shape(lambda: self.steps.empty_state(rows, length_bucket(PROMPT + NEW)))
        nothing = jnp.asarray([-1], jnp.int32)
        traced = self.steps.burst.trace(self.params, _GREEDY, state, nothing, MAX_BURST, 0)
        return traced.lower().compile()

    def prefill_mb(self, chunk: int, slots: int) -> float:
        """MB of temporary memory of a prefill of `chunk` tokens into a cache of `slots`."""
        shape = jax.ShapeDtypeStruct
        x = shape((1, chunk, self.config.decoder.hidden_size), self.dtype)
        caches = jax.eval_shape(lambda: self.steps.caches(1, slots))
        positions = shape((1, chunk), jnp.int32)
        compiled = self.steps.prefill.lower(self.params, x, positions, caches).compile()
        return round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)

    def _prefilled(self, batch: Batch, chunk: int):
        rows, length = batch.tokens.shape
        steps, tiles = self.steps, len(batch.tiles)
        table = steps.table(self.params, tiles)
        if tiles:
            slots = np.arange(tiles, dtype=np.int32)
            table = steps.encode(self.params, table, batch.tiles, slots)
        x = steps.embed(self.params, table, batch.tokens, batch.image_index)
        caches = steps.caches(rows, length)
        for start in range(0, length, chunk):
            positions = batch.positions[:, start : start + chunk]
            part = x[:, start : start + chunk] if chunk < length else x
            hidden, caches = steps.prefill(self.params, part, positions, caches)
        return hidden, caches

    def _start(self, batch: Batch, new: int) -> DecodeState:
        rows, length = batch.tokens.shape
        hidden, caches = self._prefilled(batch, length)
        at, seeds = np.full(rows, length - 1, np.int32), np.zeros((rows, 2), np.uint32)
        last = self.steps.gather_last(np.zeros((rows, hidden.shape[-1]), self.dtype), hidden, at)
        seen = np.zeros((rows, self.config.decoder.vocab_size), bool)
        first = self.steps.begin(
            *(self.params, _GREEDY, last, seen, at + 1, seeds, np.ones(rows, bool))
        )
        state = self.steps.empty_state(rows, length_bucket(length + new))
        return self.steps.insert(state, first, caches, np.arange(rows, dtype=np.int32))


_GREEDY = SamplingParams.create()


def seconds_of(function: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call after a first one; a float result is taken as the seconds."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        out = jax.block_until_ready(function())
        seconds.append(out if isinstance(out, float) else time.perf_counter() - start)
    return seconds[1:]


def rate(count: int, seconds: list[float]) -> dict[str, float]:
    """Median and best number per second."""
    rates = [count / s for s in seconds]
    return {"median": round(statistics.median(rates), 2), "best": round(max(rates), 2)}


def duration(seconds: list[float]) -> dict[str, float]:
    """Median and best seconds."""
    return {"median": round(statistics.median(seconds), 4), "best": round(min(seconds), 4)}


def memory_rate(repeats: int) -> float:
    """Bytes per second of a sum over 256 MB; the best of `repeats`."""
    array = jnp.ones((64, 1 << 20), jnp.float32)
    total = jax.jit(lambda a: a.sum(axis=1))
    return array.nbytes / min(seconds_of(lambda: total(array), repeats))


def token_bytes(config: VL2Config, params) -> int:
    """Bytes of the decoder weights that one token uses: its experts and its embedding row only."""
    cfg, total = config.decoder, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["params"]["decoder"]):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if "experts" in names:
            total += leaf.nbytes * cfg.num_experts_per_tok // cfg.n_routed_experts
        elif "embed_tokens" in names:
            total += leaf.nbytes // cfg.vocab_size
        else:
            total += leaf.nbytes
    return total


def measure(config: VL2Config, dtype: str, repeats: int, quantize: str | None) -> dict:
    """All measurements of one case."""
    case = Case(config, dtype, quantize=quantize)
    speed, used = memory_rate(repeats), token_bytes(config, case.params)
    return {
        "vision_tiles_per_s": rate(4, seconds_of(case.vision(), repeats)),
        "prefill_tokens_per_s": rate(1024, seconds_of(case.prefill(), repeats)),
        "e2e_prefill_s": duration(seconds_of(case.picture(), repeats)),
        "decode_tokens_per_s_b1": rate(NEW, seconds_of(case.decode(1), repeats)),
        "decode_tokens_per_s_b8": rate(8 * NEW, seconds_of(case.decode(8), repeats)),
        "decode_bound_b1": round(speed / used, 1),
        "memory_gb_per_s": round(speed / 1e9, 1),
        "token_mb": round(used / 1e6, 1),
    }


def step_ms(case: Case, repeats: int, *args, **options) -> float:
    """Milliseconds per decode step, the best of `repeats`; see `Case.decode`."""
    return round(1000 * min(seconds_of(case.decode(*args, **options), repeats)) / NEW, 2)


def context_growth(config: VL2Config, dtype: str, repeats: int) -> Iterator[dict]:
    """Decode step after prompts of several lengths, and their prefill in chunks of 256."""
    case, chunk = Case(config, dtype), 256
    for context in (256, 512, 1024, 2048, 3840):
        prefill = seconds_of(case.prefill(context, chunk), repeats)
        cache = jax.eval_shape(lambda n=context: case.steps.caches(1, n))
        mb = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache)) / 1e6
        yield {
            "context": context,
            "step_ms": step_ms(case, repeats, 1, context),
            "cache_mb": round(mb, 2),
            "chunked_prefill_s": duration(prefill),
            "temporaries_mb": case.prefill_mb(chunk, context),
        }


def batch_growth(config: VL2Config, dtype: str, repeats: int) -> Iterator[dict]:
    """Decode step with several batch sizes."""
    case = Case(config, dtype)
    for rows in (1, 2, 4, 8, 16, 32, 64):
        ms = step_ms(case, repeats, rows)
        yield {"batch": rows, "step_ms": ms, "tokens_per_s": round(1000 * rows / ms, 1)}


def expert_growth(config: VL2Config, dtype: str, repeats: int) -> Iterator[dict]:
    """Decode step with batch sizes 1 and 8, for several numbers of experts, six of them active."""
    for experts in (8, 16, 32, 64):
        decoder = {"n_routed_experts": experts, "num_experts_per_tok": 6}
        decoder = dataclasses.replace(config.decoder, **decoder)
        case = Case(dataclasses.replace(config, decoder=decoder), dtype)
        ms = {f"step_ms_b{rows}": step_ms(case, repeats, rows) for rows in (1, 8)}
        yield {"experts": experts} | ms


STUDIES = {
    "context": context_growth,
    "batch": batch_growth,
    "experts": expert_growth,
}


def main() -> None:
    parser = medium.case_parser(__doc__)
    parser.add_argument(
        "--study", choices=STUDIES, help="time a decode step for several values of this"
    )
    parser.add_argument("--layers", type=int, help="number of decoder layers (8)")
    kinds = dict(nargs="+", choices=("none", *KINDS), default=["none"])
    parser.add_argument("--quantize", **kinds, help="kinds of weights (without --study)")
    args = parser.parse_args()
    for attention in args.attention:
        config = medium.medium_config(attention)
        if args.layers:
            decoder = dataclasses.replace(config.decoder, num_hidden_layers=args.layers)
            config = dataclasses.replace(config, decoder=decoder)
        for dtype in args.dtype:
            case = {"attention": attention, "dtype": dtype}
            case |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
            if args.study:
                for result in STUDIES[args.study](config, dtype, args.repeats):
                    print(json.dumps(result | case), flush=True)
                continue
            for kind in args.quantize:
                found = measure(config, dtype, args.repeats, None if kind == "none" else kind)
                print(json.dumps(found | {"quantize": kind} | case), flush=True)


if __name__ == "__main__":
    main()
