"""Compares implementations of the routed experts of one layer.

    python benchmarks/bench_experts.py [--tokens 2048] [--repeats 5]

The implementations are `blocked`, `dense`, `dense_batched` and `jax.lax.ragged_dot`.
`dense_batched` does the same work as `dense` with one batched product per weight, which XLA runs
faster on the CPU than the plain einsum.

The implementations run in turns in one process, so that noise affects all of them.  Each turn
starts with a call that is not timed: it takes the page faults for memory that the previous program
freed.  Prints one JSON line: median seconds, and ratios to `blocked`, for the forward pass and for
the gradients.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp

from vl2jax.ops.experts import ExpertWeights
from vl2jax.ops.experts.reference import dense
from vl2jax.ops.experts.xla import blocked


def ragged(x, weights, chosen, w: ExpertWeights):
    """Sorts the rows by expert and runs three `ragged_dot`."""
    flat, top_k = chosen.reshape(-1), chosen.shape[-1]
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=w.gate.shape[0]).astype(jnp.int32)
    rows = x[order // top_k]
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, w.gate, sizes))
    hidden *= jax.lax.ragged_dot(rows, w.up, sizes)
    y = jax.lax.ragged_dot(hidden, w.down, sizes)[jnp.argsort(order)]
    return jnp.einsum("tk,tkd->td", weights, y.reshape(*chosen.shape, -1))


def dense_batched(x, weights, chosen, w: ExpertWeights):
    """Runs every expert on every token, as three products batched over experts."""
    y = jax.vmap(lambda e: (jax.nn.silu(x @ e.gate) * (x @ e.up)) @ e.down)(w)  # [E, T, D]
    dense_weights = jnp.einsum("tk,tke->te", weights, jax.nn.one_hot(chosen, w.gate.shape[0]))
    return jnp.einsum("te,etd->td", dense_weights, y)


def inputs(tokens: int, width: int, hidden: int, experts: int, top_k: int):
    """Random tokens, routing weights, chosen experts and expert weights."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((experts, width, hidden), (experts, width, hidden), (experts, hidden, width))
    w = ExpertWeights(
        *(
            jax.random.normal(key, shape) * shape[1] ** -0.5
            for key, shape in zip(keys, shapes, strict=False)
        )
    )
    x = jax.random.normal(keys[3], (tokens, width))
    probabilities = jax.nn.softmax(jax.random.normal(keys[4], (tokens, experts)))
    weights, chosen = jax.lax.top_k(probabilities, top_k)
    return x, weights, chosen, w


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    shape = {"width": 512, "hidden": 256, "experts": 64, "top_k": 6}
    x, weights, chosen, w = inputs(args.tokens, **shape)

    def with_gradients(implementation):
        def loss(x, weights, w):
            return jnp.square(implementation(x, weights, chosen, w)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    def forward(implementation):
        return jax.jit(lambda x, weights, w: implementation(x, weights, chosen, w))

    result = {"benchmark": "experts", "tokens": args.tokens, **shape, "jax": jax.__version__}
    result |= {"device": jax.devices()[0].device_kind, "dtype": "float32"}
    implementations = {
        "blocked": blocked,
        "dense": dense,
        "dense_batched": dense_batched,
        "ragged_dot": ragged,
    }
    for mode, wrap in (("forward", forward), ("gradients", with_gradients)):
        programs = {name: wrap(f) for name, f in implementations.items()}
        outputs = {n: jax.block_until_ready(p(x, weights, w)) for n, p in programs.items()}
        scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(outputs["dense"]))
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(args.repeats):
            for name, program in programs.items():
                jax.block_until_ready(program(x, weights, w))
                start = time.perf_counter()
                jax.block_until_ready(program(x, weights, w))
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        result[mode] = {
            "seconds": {name: round(value, 4) for name, value in median.items()},
            "times_blocked": {n: round(v / median["blocked"], 1) for n, v in median.items()},
            "relative_difference": {
                name: float(f"{_difference(outputs['dense'], output) / scale:.1e}")
                for name, output in outputs.items()
            },
        }
    print(json.dumps(result))


def _difference(a, b) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(max(jnp.abs(left - right).max() for left, right in pairs))


if __name__ == "__main__":
    main()
