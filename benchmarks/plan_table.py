"""Plans of the released sizes on TPU slices, for the tables of README.md and docs/scaling.md.

    python benchmarks/plan_table.py            # plans what benchmarks/plan.jsonl lacks, then writes
    python benchmarks/plan_table.py --again    # plans everything again (hours on two cores)
    python benchmarks/plan_table.py --write    # only writes the tables and the plot

Each program is compiled in a subprocess, with `python -m vl2jax.plan`.  It needs libtpu, and
matplotlib for the plot.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

import plan_plot
from readme_tables import markdown, put

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "plan.jsonl"
EFFORT = "--effort=-1"  # compiles in half the time; memory and work hardly differ


def train(size: str, stage: str, slice_: str, mesh: str, *more: str) -> tuple[str, ...]:
    """Flags of `vl2jax.plan` for a train step.

    Args:
      size: released size.
      stage: stage of its configuration.
      slice_: TPU slice.
      mesh: mesh axes, such as "fsdp=8,expert=8".
      *more: fields of the batch, such as "microbatches=4".
    """
    axes = (f"--config.mesh.{axis}" for axis in mesh.split(","))
    config = f"--config=configs/vl2_{size}.py:{stage}"
    return (config, f"--topology={slice_}", *axes, *(f"--config.batch.{m}" for m in more), EFFORT)


def sample(size: str, slice_: str, mesh: str, rows: int, what: str) -> tuple[str, ...]:
    """Flags for "prefill" or "decode": prompts of 1024 tokens, answers of up to 1024."""
    flags = train(size, "sft", slice_, mesh)
    return (*flags, f"--what={what}", f"--rows={rows}", "--prompt=1024", "--slots=2048")


def per_chip(slice_: str) -> int:
    """Number of chips of a slice: the number of rows, so that each chip has one row."""
    sizes = [int(n) for n in slice_.partition(":")[2].split("x")]
    product = 1
    for size in sizes:
        product *= size
    return product


def cases() -> dict[str, list[tuple[str, ...]]]:
    """Flags of all programs, by table."""
    trained = [
        train("tiny", "sft", "v5e:2x4", "fsdp=8", "microbatches=4"),
        train("tiny", "sft", "v6e:2x4", "fsdp=8"),
        train("tiny", "sft", "v6e:2x4", "fsdp=8", "microbatches=4"),
        train("small", "sft", "v5p:2x2x2", "fsdp=8"),
        train("small", "sft", "v5p:2x2x2", "fsdp=4,expert=2"),
        train("small", "sft", "v6e:8x8", "fsdp=64"),
        train("small", "sft", "v6e:8x8", "fsdp=8,expert=8"),
        train("base", "sft", "v5p:4x4x4", "fsdp=64"),
        train("base", "sft", "v5p:4x4x4", "fsdp=16,expert=4"),
        train("base", "sft", "v5p:4x4x4", "fsdp=8,expert=8"),
        train("base", "pretrain", "v5p:2x4x4", "fsdp=32", "microbatches=35"),
        train("base", "pretrain", "v5p:2x4x4", "fsdp=8,expert=4", "microbatches=35"),
    ]
    sampled = [
        sample(size, slice_, mesh, rows, what)
        for size, slice_, mesh, rows in (
            ("tiny", "v5e:1x1", "fsdp=1", 8),
            ("small", "v6e:2x2", "fsdp=1,expert=4", 8),
            ("small", "v5e:2x4", "fsdp=1,expert=8", 8),
            ("base", "v5p:2x2x1", "fsdp=1,expert=4", 8),
        )
        for what in ("prefill", "decode")
    ]
    # Growth of the exchange of tokens, without images.  Small has 64 experts, which 32 divides.
    widths = [
        train("small", "sft", "v5p:2x4x4", f"fsdp={32 // n},expert={n}", "rows=32", "tiles=0")
        for n in (1, 2, 4, 8, 16, 32)
    ]
    slices = dict.fromkeys(("v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x8"), "fsdp=-1,expert=4")
    slices["v5p:8x8x16"] = (
        "data=2,fsdp=-1,expert=4"  # 128 divides the widths of the model, 256 does not
    )
    chips = [
        train("base", "sft", s, mesh, f"rows={n}", f"tiles={10 * n}")
        for s, mesh in slices.items()
        for n in [per_chip(s)]
    ]
    return {"train": trained, "sample": sampled, "width": widths, "chips": chips}


def run(flags: tuple[str, ...]) -> dict:
    """Runs `vl2jax.plan`; returns its result, or its error message as `error`."""
    command = [sys.executable, "-m", "vl2jax.plan", *flags, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0:
        return json.loads(lines[-1])
    last = done.stderr.strip().splitlines()[-1]
    if not last.startswith("error: "):
        raise RuntimeError(done.stderr)
    return {"error": last.removeprefix("error: ")}


def known() -> dict[str, dict]:
    """The recorded results, by flags."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {entry["flags"]: entry for entry in map(json.loads, lines)}


def _per_token(entry: dict) -> float:
    return entry["roofline"]["step"] / entry["tokens"]


def _mesh(entry: dict) -> str:
    return ", ".join(f"{axis} {n}" for axis, n in entry["mesh"].items() if n > 1) or "one chip"


def _row(entry: dict, flags: str) -> list[str]:
    size, bound = entry["bytes"], entry["roofline"]
    parts = re.search(r"microbatches=(\d+)", flags)
    mesh = _mesh(entry) + (f"; {parts[1]} microbatches" if parts else "")
    return [
        f"{entry['config'].removeprefix('vl2_')}",
        f"{entry['topology']} ({entry['devices']})",
        mesh,
        f"{size['peak'] / 2**30:.1f} of {entry['hbm'] / 2**30:.0f}",
        f"{bound['compute']:.3g} / {bound['memory']:.3g} / {bound['links']:.3g}",
        bound["binding"],
        f"{entry['tokens'] / bound['step']:,.0f}",
        f"{100 * entry['mfu_bound']:.0f}%",
    ]


def train_table(entries: list[dict], *, best_only: bool) -> str:
    """Formats train steps; for each slice only the best mesh, or all with the best one in bold."""
    best: dict[tuple, dict] = {}
    for entry in entries:
        if "error" not in entry:
            key = entry["config"], entry["topology"]
            best[key] = min(best.get(key, entry), entry, key=_per_token)
    head = ["run", "slice (chips)", "mesh", "GiB on a chip", "compute / memory / links, s"]
    rows = [[*head, "bound by", "tokens/s at most", "MFU at most"]]
    for entry in entries:
        if "error" in entry:
            rows.append([entry["flags"], entry["error"], *[""] * 6])
            continue
        is_best = best[entry["config"], entry["topology"]] is entry
        row = _row(entry, entry["flags"])
        if is_best or not best_only:
            rows.append([f"**{cell}**" if is_best and not best_only else cell for cell in row])
    return markdown(rows)


def sample_table(entries: list[dict]) -> str:
    """Formats prefill and decode side by side."""
    rows = [
        ["model", "slice (chips)", "mesh", "GiB on a chip", "prefill, s", "decoding, ms per token"]
    ]
    both = {(e["config"], e["topology"], e["what"]): e for e in entries}
    for (name, slice_, what), decode in both.items():
        if what != "decode":
            continue
        prefill = both.get((name, slice_, "prefill"))
        first = "not compiled yet"
        if prefill is not None:
            bound = prefill["roofline"]
            first = f"{bound['step']:.3f} ({bound['binding']})"
        peak = max(e["bytes"]["peak"] for e in (prefill, decode) if e is not None) / 2**30
        per_token = 8e3 * _per_token(decode)
        rows.append(
            [
                decode["config"].removeprefix("vl2_").removesuffix("-sft"),
                f"{decode['topology']} ({decode['devices']})",
                _mesh(decode),
                f"{peak:.1f} of {decode['hbm'] / 2**30:.0f}",
                first,
                f"{per_token:.1f} ({decode['roofline']['binding']})",
            ]
        )
    return markdown(rows)


def width_table(entries: list[dict]) -> str:
    """Formats the bytes that a chip sends per local token, by size of the expert axis."""
    rows = [["expert axis", "exchange of tokens", "weights and gradients", "links, s", "GiB"]]
    for entry in entries:
        exchange, weights = plan_plot.sent_per_token(entry)
        rows.append(
            [
                str(entry["mesh"]["expert"]),
                f"{exchange / 1e3:.0f} kB",
                f"{weights / 1e3:.0f} kB",
                f"{entry['roofline']['links']:.2f}",
                f"{entry['bytes']['peak'] / 2**30:.1f}",
            ]
        )
    return markdown(rows)


def chips_table(entries: list[dict]) -> str:
    """Formats memory per chip and step time for several slices, with one row of tokens per chip."""
    head = ["chips", "mesh", "parameters", "optimizer", "temporaries", "peak, GiB"]
    rows = [[*head, "compute / memory / links, s"]]
    for entry in entries:
        size, bound = entry["bytes"], entry["roofline"]
        parts = [size[name] / 2**30 for name in ("parameters", "optimizer", "temporaries", "peak")]
        times = " / ".join(f"{bound[name]:.2f}" for name in ("compute", "memory", "links"))
        rows.append([str(entry["devices"]), _mesh(entry), *(f"{n:.1f}" for n in parts), times])
    return markdown(rows)


def write(results: dict[str, dict]) -> None:
    """Writes all tables and the plot from the recorded results."""
    found = {
        name: [results[key] for flags in group if (key := " ".join(flags)) in results]
        for name, group in cases().items()
    }
    scaling = ROOT / "docs" / "scaling.md"
    put(ROOT / "README.md", "plan: train", train_table(found["train"], best_only=True))
    put(ROOT / "README.md", "plan: sample", sample_table(found["sample"]))
    put(scaling, "plan: train", train_table(found["train"], best_only=False))
    for name, table in (("width", width_table), ("chips", chips_table)):
        missing = f"Not compiled yet: `python benchmarks/plan_table.py --only {name}`."
        put(scaling, f"plan: {name}", table(found[name]) if found[name] else missing)
    picture = ROOT / "docs" / "scaling.png"
    drawn = found["width"] and found["chips"]
    if drawn:
        plan_plot.draw(found["width"], found["chips"], picture)
    put(scaling, "plan: plot", "![bytes sent and memory held](scaling.png)" if drawn else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="delete the recorded results")
    parser.add_argument("--write", action="store_true", help="write the tables, compile nothing")
    parser.add_argument("--only", default="", help="one table: train, sample, width or chips")
    options = parser.parse_args()
    if options.again:
        RESULTS.unlink(missing_ok=True)
    for name, group in cases().items():
        for flags in group if not options.write and options.only in ("", name) else ():
            key = " ".join(flags)
            if key not in known():
                entry = {"flags": key, **run(flags)}
                with RESULTS.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                print(json.dumps(entry), flush=True)
    if not options.only:
        write(known())


if __name__ == "__main__":
    main()
