"""Times the search for shared prefixes in the queue of requests, on the host, without a model.

    python benchmarks/bench_queue.py [--places 256] [--free 1] [--tokens 600] [--images 64]

Prompts begin with one text of 32 tokens, then one of several images, then a question of their own;
with `--images 0` they share nothing.  `--free` places are free at a time.  Prints one JSON line:
milliseconds per refill (median and worst), and how many tokens of all prompts are prefilled.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator

import numpy as np

from vl2jax.inference.admission import WaitingQueue
from vl2jax.inference.completion import Completion
from vl2jax.inference.prefix_cache import Prefix, PrefixCache
from vl2jax.inference.sequence import Prompt, Sequence
from vl2jax.processing.batch import FIRST_TILE_ROW, TEXT

SYSTEM = 32


def make_requests(count: int, tokens: int, images: int) -> Iterator[Sequence]:
    """Sequences with prompts of `tokens` tokens, about `images` images in turn; 0: all differ."""
    dice, visual = np.random.default_rng(0), tokens - SYSTEM - 16
    index = np.full(tokens, TEXT, np.int32)
    index[SYSTEM : SYSTEM + visual] = FIRST_TILE_ROW + np.arange(visual)
    for number in range(count):
        image = number % images if images else number
        tile = np.frombuffer(np.uint32(image).tobytes() * 3, np.uint8).reshape(1, 2, 2, 3)
        ids = np.arange(tokens, dtype=np.int32) + (0 if images else number)
        ids[-16:] = dice.integers(0, 100_000, 16)
        prompt = Prompt(ids, index, tile, visual)
        yield Sequence(Completion(None, (), (), 1), prompt, 0, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", type=int, default=256)
    parser.add_argument("--free", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    count = 8 * args.places
    queue = WaitingQueue(make_requests(count, args.tokens, args.images), 4 * args.places)
    cache, seconds, prefilled = PrefixCache(), [], 0
    queue.refill()
    while queue:
        start = time.perf_counter()
        group = queue.take(cache, args.free)
        if group.keep:
            cache.add(Prefix(group.rows[0].prompt.blocks, {}))
        queue.refill()
        seconds.append(time.perf_counter() - start)
        prefilled += sum(len(row.prompt) - group.common for row in group.rows)
    found = {
        "places": args.places,
        "free": args.free,
        "images": args.images,
        "refill_ms": round(1000 * statistics.median(seconds), 3),
        "worst_ms": round(1000 * max(seconds), 2),
        "prompt_tokens": count * args.tokens,
        "prefilled_tokens": prefilled,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
