"""Times a train step of the medium models: forward, backward, AdamW on all parameters.

    python benchmarks/bench_train.py [--attention mla mha] [--dtype float32 bfloat16]
        [--remat dots] [--repeats 5]
    python benchmarks/bench_train.py --parts      # the time of each part of the model
    python benchmarks/bench_train.py --growth     # for several numbers of tokens and of experts

The batch has two rows of 512 tokens, each with one image of 421 tokens (two tiles).  Prints one
JSON line per case: median and best seconds of a step, without the first call; the memory of the
compiled program; and the maximum resident set size of this process so far.
"""

import dataclasses
import functools
import json
import resource
import statistics
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import medium
import optax

from vl2jax.config import VL2Config
from vl2jax.model.attention import MHA, MLA, Context
from vl2jax.model.moe import MoE
from vl2jax.model.rope import rope_table
from vl2jax.model.vl2 import VL2, abstract_params
from vl2jax.ops.compiler_options import compiler_options
from vl2jax.training.chunked_loss import chunked_next_token_loss
from vl2jax.training.optim import OptimConfig, learning_rate, make_optimizer, trained_paths
from vl2jax.training.train_step import Recipe, TrainState, init_state, train_step


def make_recipe(config: VL2Config, dtype: str, remat: str = "none") -> Recipe:
    """Makes a recipe that trains all parameters with AdamW, clipping and weight decay."""
    model = VL2(config, jnp.dtype(dtype), remat=remat)
    shapes = abstract_params(config)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    paths = ("/".join(key.key for key in path) for path, _ in leaves)
    cfg = OptimConfig(lr=1e-4, schedule="constant")
    return Recipe(
        model=model,
        optimizer=make_optimizer(cfg, steps=1000),
        schedule=learning_rate(cfg, steps=1000),
        trained=trained_paths(cfg, paths),
    )


def time_step(config: VL2Config, dtype: str, remat: str, batch, repeats: int) -> dict:
    """Compiles a train step and times it; the state is donated."""
    recipe = make_recipe(config, dtype, remat)
    state = jax.jit(lambda key: init_state(recipe, key))(jax.random.key(0))
    batch = jax.tree.map(lambda a: jnp.asarray(a)[None], batch)  # one microbatch
    step = jax.jit(
        functools.partial(train_step, recipe),
        donate_argnums=0,
        compiler_options=compiler_options(recipe.model.dtype),
    )
    start = time.perf_counter()
    program = step.lower(state, batch).compile()
    compiled = time.perf_counter() - start
    memory = program.memory_analysis()

    def run(state: TrainState):
        return program(state, batch)[0]

    seconds = _times(run, state, repeats, chained=True)
    return {
        **_summary(seconds),
        "compile_s": round(compiled, 1),
        "program_temporaries_mb": memory.temp_size_in_bytes >> 20,
        "program_arguments_mb": memory.argument_size_in_bytes >> 20,
        "peak_rss_mb": _peak_rss() >> 20,
    }


def time_parts(config: VL2Config, dtype: str, batch, repeats: int) -> dict:
    """Seconds of each part of the model with its gradients; layers of a kind are summed."""
    recipe = make_recipe(config, dtype)
    state = jax.jit(lambda key: init_state(recipe, key))(jax.random.key(0))
    cfg, model, kinds = config.decoder, recipe.model, {"dtype": recipe.model.dtype}
    batch = jax.tree.map(jnp.asarray, batch)
    x = jax.random.normal(jax.random.key(1), (*batch.tokens.shape, cfg.hidden_size), model.dtype)
    table = rope_table(cfg, batch.positions, x.shape[1])
    context = Context(batch.positions, batch.segment_ids, *table)
    attention = (MLA if cfg.use_mla else MHA)(cfg, **kinds)
    experts = MoE(cfg, **kinds)
    moe_layers = sum(run.count for run in cfg.layer_runs if run.is_moe)
    kernel = state.params["decoder"]["lm_head"]["kernel"]

    def loss(hidden, kernel):
        return chunked_next_token_loss(hidden, kernel, batch, dtype=model.dtype).loss_sum

    def update(trained, opt_state):
        updates, opt_state = recipe.optimizer.update(trained, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state

    def vision(params, tiles):
        return model.apply({"params": params}, tiles, method=VL2.image_table)

    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    flat = {"/".join(key.key for key in path): leaf for path, leaf in leaves}
    layer = jnp.int32(0)
    parts = {
        "vision": (1, _gradients(vision), (state.params, batch.tiles)),
        "attention": (cfg.num_hidden_layers, *_layer(attention, x, context, None, layer)),
        "experts": (moe_layers, *_layer(experts, x, batch.segment_ids, layer)),
        "loss": (1, jax.grad(loss, argnums=(0, 1)), (x, kernel)),
        "optimizer": (1, update, (flat, state.opt_state)),
    }
    result = {}
    for name, (count, function, inputs) in parts.items():
        program = jax.jit(function, compiler_options=compiler_options(model.dtype))
        jax.block_until_ready(program(*inputs))
        seconds = _times(lambda p=program, a=inputs: p(*a), None, repeats)
        result[name] = {key: round(count * s, 4) for key, s in _summary(seconds, 6).items()}
    return result


def _layer(module: nn.Module, x: jax.Array, *arguments):
    """A function for the gradients of a layer by its parameters and by x, and its inputs."""
    params = jax.jit(module.init)(jax.random.key(2), x, *arguments)
    function = lambda params, x: module.apply(params, x, *arguments)[0]  # noqa: E731
    return _gradients(function, (0, 1)), (params, x)


def _gradients(function, argnums=0):
    return jax.grad(lambda *a: jnp.sum(function(*a).astype(jnp.float32) ** 2), argnums=argnums)


def _times(function, state, repeats: int, chained: bool = False) -> list[float]:
    """Seconds of each call after a first one; `chained`: each call gets the previous result."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        out = jax.block_until_ready(function(state) if chained else function())
        seconds.append(time.perf_counter() - start)
        state = out if chained else state
    return seconds[1:]


def _summary(seconds: list[float], digits: int = 3) -> dict[str, float]:
    return {
        "median": round(statistics.median(seconds), digits),
        "best": round(min(seconds), digits),
    }


def _peak_rss() -> int:
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _growth(config: VL2Config):
    """Cases of `--growth`, one row of text each: name, value, configuration, batch."""
    for tokens in (256, 512, 1024, 2048, 4096):
        yield "tokens", tokens, config, medium.training_batch(config, 1, tokens, False)
    for experts in (8, 16, 32, 64):
        decoder = dataclasses.replace(config.decoder, n_routed_experts=experts)
        other = dataclasses.replace(config, decoder=decoder)
        yield "experts", experts, other, medium.training_batch(other, 1, 1024, False)


def main() -> None:
    parser = medium.case_parser(__doc__)
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--growth", action="store_true")
    args = parser.parse_args()
    for attention in args.attention:
        config = medium.medium_config(attention)
        for dtype in args.dtype:
            case = {"attention": attention, "dtype": dtype, "remat": args.remat}
            case |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
            if args.growth:
                for name, value, other, batch in _growth(config):
                    result = time_step(other, dtype, args.remat, batch, args.repeats)
                    print(json.dumps({"train_step_s": result, name: value, **case}), flush=True)
                continue
            batch = medium.training_batch(config)
            if args.parts:
                result = {"train_parts_s": time_parts(config, dtype, batch, args.repeats)}
            else:
                result = {"train_step_s": time_step(config, dtype, args.remat, batch, args.repeats)}
            print(json.dumps(result | case), flush=True)


if __name__ == "__main__":
    main()
