"""HBM traffic of a decoding step, bfloat16 and int8, from programs compiled for TPU.

    python benchmarks/int8_reads.py

Compiles seven MoE layers of the released Small behind a small dense layer and a small vocabulary,
because the experts are what differs.  Prints a table in Markdown.  It needs libtpu.
"""

import pathlib
import sys

import jax

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

ROWS = (1, 8, 16, 64)
SLICES = {"v5e:1x1": {}, "v5e:2x4": {"expert": 8}}


def step_bytes(topology: str, mesh: dict[str, int], rows: int, quantize: str | None) -> float:
    """Bytes that a device reads and writes in one decoding step."""
    from configs import vl2_small
    from vl2jax.inference.steps import MAX_BURST
    from vl2jax.plan.planning import plan
    from vl2jax.plan.programs import GenerationSizes
    from vl2jax.training.run_config import read_run_config

    config = vl2_small.get_config("sft")
    decoder = config.model.language_config
    decoder.num_hidden_layers, decoder.vocab_size, decoder.intermediate_size = 8, 1024, 1024
    config.mesh.update({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | mesh)
    sizes = GenerationSizes(rows=rows, prompt=64, slots=128, quantize=quantize)
    found = plan(read_run_config(config.to_dict()), topology, "decode", sizes)
    assert not found["open_loops"] and not found["unknown_kernels"], found
    return found["traffic"] / MAX_BURST


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    print("| slice, mesh | rows | bfloat16, GB | int8, GB | int8 / bfloat16 |")
    print("|---|---|---|---|---|")
    for topology, mesh in SLICES.items():
        axes = "".join(f", {axis} {n}" for axis, n in mesh.items())
        for rows in ROWS:
            plain, int8 = (step_bytes(topology, mesh, rows, kind) for kind in (None, "int8"))
            cells = f"{plain / 1e9:.3f} | {int8 / 1e9:.3f} | {int8 / plain:.2f}"
            print(f"| {topology}{axes} | {rows} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
