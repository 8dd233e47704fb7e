"""Profiles a decode step: the time of each part of the model.

    python benchmarks/token_time.py [--attention mla mha] [--dtype float32 bfloat16] [--rows 1 8]
        [--instructions N]

Prints one JSON line per case.  `step_ms` is the time of a step in the fastest of `--repeats` bursts
without the profiler.  `parts_us` is the time of the instructions of each part in a burst with the
profiler; instructions can overlap, and the profiler adds overhead.  `--instructions N` also lists
the N kinds of instruction that take the most time.  A fusion that spans several parts counts for
the part of its result.  An instruction without a name, such as a slice of stacked weights, counts
for the part that uses its result.
"""

import collections
import glob
import json
import re
import tempfile

import bench_generate
import jax
import medium

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (\S+) ([\w\-]+)\(")
_SKIPPED = ("while", "call", "conditional")  # they contain other instructions
_PARTS = (
    ("attention", "self_attn"),
    ("routed experts", "mlp/experts"),
    ("shared experts", "mlp/shared_experts"),
    ("router", "mlp/gate/"),
    ("dense MLP", "mlp/"),
    ("norms", "layernorm"),
    ("head", "VL2.logits"),
)


def model_part(name: str) -> str:
    """The part of the model that an instruction with this `op_name` belongs to."""
    return next((part for part, mark in _PARTS if mark in name), "sampling and the rest")


def instructions(text: str) -> dict[str, tuple[str, str, str]]:
    """Parses a compiled program.

    Returns:
      Opcode, shape and `op_name` of each instruction, by name.  If the `op_name` of a fusion is of
      no part, it is taken from the fused instructions; if that is also of no part, from an
      instruction that uses its result.
    """
    found, users, inner, computation = {}, collections.defaultdict(list), {}, ""
    for line in text.splitlines():
        if line.startswith("%"):
            computation = line[1:].split(" ")[0]
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, shape, kind = match.groups()
        told = re.search(r'op_name="([^"]*)"', line)
        called = re.search(r"calls=%([\w.\-]+)", line)
        own = told.group(1) if told else ""
        if called and model_part(own) == model_part(""):
            own = inner.get(called.group(1), own)
        if model_part(own) != model_part("") or computation not in inner:
            inner[computation] = own
        found[name] = (kind, shape.split("{")[0], own)
        for operand in re.findall(r"%([\w.\-]+)", line[match.end() :]):
            users[operand].append(name)
    for name, (kind, shape, own) in reversed(found.items()):  # users of a result come later
        if model_part(own) == model_part(""):
            takers = (found[user][2] for user in users[name])
            own = next((told for told in takers if model_part(told) != model_part("")), own)
            found[name] = (kind, shape, own)
    return found


def profile(case: bench_generate.Case, rows: int, repeats: int) -> dict:
    """Milliseconds per step, and microseconds of its parts and its kinds of instruction."""
    run, steps = case.decode(rows), bench_generate.NEW
    seconds = min(bench_generate.seconds_of(run, repeats))
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (file,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
        events = [
            (dict(event.stats), event.duration_ns)
            for plane in jax.profiler.ProfileData.from_file(file).planes
            for line in plane.lines
            for event in line.events
        ]
    known = instructions(case.compiled_burst(rows).as_text())
    parts, kinds = collections.Counter(), collections.Counter()
    for stats, nanoseconds in events:
        name = stats.get("hlo_op")
        if "burst" not in str(stats.get("hlo_module")) or name not in known:
            continue
        kind, shape, told = known[name]
        if kind not in _SKIPPED:
            parts[model_part(told)] += nanoseconds
            kinds[f"{model_part(told)}: {re.sub(r'[.0-9]+$', '', name)} {shape}"] += nanoseconds
    return {
        "step_ms": round(1000 * seconds / steps, 2),
        "parts_us": _microseconds(parts, steps),
        "kinds_us": _microseconds(kinds, steps),
    }


def _microseconds(counter: collections.Counter, steps: int) -> dict[str, float]:
    return {name: round(ns / steps / 1000, 1) for name, ns in counter.most_common()}


def main() -> None:
    parser = medium.case_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--instructions", type=int, default=0)
    args = parser.parse_args()
    for attention in args.attention:
        for dtype in args.dtype:
            case = bench_generate.Case(medium.medium_config(attention), dtype)
            for rows in args.rows:
                found = profile(case, rows, args.repeats)
                kinds = found.pop("kinds_us")
                what = {"attention": attention, "dtype": dtype, "rows": rows}
                if args.instructions:
                    found["kinds_us"] = dict(list(kinds.items())[: args.instructions])
                print(json.dumps(what | found), flush=True)


if __name__ == "__main__":
    main()
