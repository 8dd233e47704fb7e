"""Flags of sample.py, and what can be checked about them before anything is read."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

from vl2jax.cli.command import Parser, whole
from vl2jax.cli.output import check_drawing, check_folder
from vl2jax.cli.shards import add_distributed_flags, read_distributed_options
from vl2jax.common.errors import UserError
from vl2jax.inference.sampling import SamplingParams
from vl2jax.model.quantization import KINDS


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """All flags."""
    parser = Parser("sample.py", description)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="DIR", help="checkpoint made by convert.to_jax")
    add("--prompt", metavar="TEXT", help="one question; <image> stands for an image, in order")
    add("--image", action="append", default=[], metavar="FILE", help="repeatable")
    add("--system", metavar="TEXT", help="system message, with --prompt and in a chat")
    add("--messages", type=Path, metavar="FILE.json", help="answer a whole conversation")
    add("--batch", type=Path, metavar="IN.jsonl", help="answer each line; needs --out")
    add("--out", type=Path, metavar="OUT.jsonl", help="answers of --batch; goes on with them")
    add("--process_index", type=whole(0), metavar="I", help="which share of --batch, from 0")
    add("--process_count", type=whole(1), metavar="N", help="shards of --batch, each its own file")
    add("--batch_size", type=whole(1), default=8, help="rows answered together (8)")
    add("--max_new_tokens", type=whole(1), default=512, help="at most so many tokens (512)")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token (0)")
    add("--top_p", type=float, default=1.0, help="draw from this much probability (1: all)")
    add("--top_k", type=whole(0), default=0, help="draw from the k likeliest (0: all)")
    add("--repetition_penalty", type=float, default=1.0, help="1: none")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; repeatable")
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="of the draws (0)")
    add("--chunk_size", type=whole(0), default=0, help="prompt tokens at a time (0: all)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: as the checkpoint stores")
    add("--quantize", choices=KINDS, help="weights in memory as int8: half of bfloat16 (off)")
    add("--mesh", default="", metavar="AXIS=N,...", help="devices: expert=4,tensor=2 (one device)")
    add_distributed_flags(parser, whole)
    add("--stream", action="store_true", default=True, help="show text as it comes (default)")
    add("--nostream", dest="stream", action="store_false", help="show the answer when it is whole")
    add("--json", action="store_true", help="one JSON object per answer, on one line")
    add("--draw", type=Path, metavar="OUT.png", help="draw the answer's boxes on an image")
    add("--draw_on", type=whole(1), metavar="N", help="which image, from 1 (the last)")
    add("--raw_orientation", action="store_true", help="ignore EXIF orientation, as the original")
    add("--nocrop", action="store_true", help="no tiles: each image is seen as a whole only")
    add("--plan", action="store_true", help="only say how much memory it takes")
    add("--verbose", action="store_true", help="show what is compiled, and which kernels")
    add("--compilation_cache", metavar="DIR|off", help="(~/.cache/vl2jax/jax)")
    return parser


def parse_flags(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Parses flags and checks them alone and together.

    Args:
      argv: without the program's name; None: those of this process.
      description: what --help says first.

    Raises:
      UserError: an unknown flag, a wrong value, or flags that exclude or need each other.
    """
    parser = make_parser(description)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = ["--nostream", *(f"--{name}" for name in vars(args))]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        raise UserError(f"unknown argument {unknown[0]!r}; {hint}")
    read_distributed_options(args)
    _check_modes(args)
    _check_values(args)
    return args


def _check_modes(args: argparse.Namespace) -> None:
    """Raises UserError for flags that exclude or need each other."""
    modes = [f"--{x}" for x in ("prompt", "messages", "batch") if getattr(args, x) is not None]
    is_batch, is_one = args.batch is not None, args.prompt is not None or args.messages is not None
    joins = args.distributed or args.coordinator
    for wrong, message in (
        (len(modes) > 1, f"{' and '.join(modes)} exclude each other"),
        (is_batch and args.out is None, "--batch needs --out, a file for the answers"),
        (args.out and not is_batch, "--out is for --batch; --json writes to standard output"),
        (
            (args.process_index is None) != (args.process_count is None),
            "--process_index and --process_count need each other",
        ),
        (args.process_count and not is_batch, "--process_count is for --batch"),
        (
            args.process_count and args.process_index >= args.process_count,
            "--process_index must be below --process_count",
        ),
        (
            joins and not (modes or args.plan),
            "a chat is held with one process; give --prompt, --messages or --batch",
        ),
        (
            args.process_count and joins,
            "--process_count is for processes that do not know of each other",
        ),
        (args.image and is_batch, "--image is not for --batch; its rows name their images"),
        (args.system and (is_batch or args.messages), "--system: put it into the file instead"),
        (args.draw and not is_one, "--draw needs --prompt or --messages"),
        (args.draw_on and not is_one, "--draw_on needs --prompt or --messages"),
        (args.draw_on and not (args.draw or args.json), "--draw_on needs --draw or --json"),
    ):
        if wrong:
            raise UserError(message)


def _check_values(args: argparse.Namespace) -> None:
    """Raises UserError for values that cannot work, whatever the checkpoint."""
    SamplingParams.create(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    if "" in args.stop:
        raise UserError("--stop is empty; expected the text that ends an answer")
    for flag, path in (("--messages", args.messages), ("--batch", args.batch)):
        if path is not None and (path.is_dir() or not path.exists()):
            what = "is a directory" if path.is_dir() else "does not exist"
            raise UserError(f"{flag} {path} {what}; expected the path of a file to read")
    if args.draw:
        check_drawing(args.draw)
    if args.batch:
        check_folder("--out", args.out)
        if args.out.exists() and args.out.samefile(args.batch):
            raise UserError(f"--out {args.out} is the input; expected another file")
