"""Flags of sample.py, and the checks that need no files or devices."""

import argparse
import difflib
from collections.abc import Sequence

from vl2jax.cli.command import Parser, whole
from vl2jax.cli.output import check_drawing, check_folder
from vl2jax.cli.shards import add_distributed_flags, read_distributed_options
from vl2jax.common.errors import UserError
from vl2jax.common.paths import path_flag
from vl2jax.inference.options import MAX_N
from vl2jax.inference.sampling import SamplingParams
from vl2jax.model.quantization import KINDS


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Makes the parser of all flags.

    Args:
      description: text at the beginning of --help.
    """
    parser = Parser("sample.py", description)
    add = parser.add_argument
    local, any_path = path_flag(), path_flag(remote=True)
    what = "converted checkpoint or training workdir"
    add("--ckpt", type=any_path, required=True, metavar="DIR", help=what)
    add("--prompt", metavar="TEXT", help="a question; <image> marks the place of an image")
    add(
        "--image",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="an image; repeatable",
    )
    add("--system", metavar="TEXT", help="system message, for --prompt and chat")
    add("--messages", type=local, metavar="FILE.json", help="answer a conversation")
    add("--batch", type=local, metavar="IN.jsonl", help="answer each row of a file; needs --out")
    add("--out", type=local, metavar="OUT.jsonl", help="answers of --batch; an old file is resumed")
    add("--process_index", type=whole(0), metavar="I", help="index of this process, for --batch")
    add("--process_count", type=whole(1), metavar="N", help="split --batch into N files of answers")
    add("--retry_errors", action="store_true", help="answer rows of OUT with an error again")
    add("--batch_size", type=whole(1), default=8, help="rows answered at the same time (8)")
    add("--max_new_tokens", type=whole(1), default=512, help="maximum tokens per answer (512)")
    add("--temperature", type=float, default=0.0, help="0: greedy decoding (0)")
    add("--top_p", type=float, default=1.0, help="nucleus sampling probability (1: off)")
    any_size = whole(0, 10**99)
    add("--top_k", type=any_size, default=0, help="sample from the k likeliest tokens (0: all)")
    add("--repetition_penalty", type=float, default=1.0, help="penalty of repeated tokens (1: off)")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop string; repeatable")
    add("--seed", type=whole(-(2**63), 2**64 - 1), default=0, help="seed of sampling (0)")
    add(
        "--n",
        type=whole(1, MAX_N),
        default=1,
        help="answers to each prompt, with different seeds (1)",
    )
    add("--chunk_size", type=whole(0), default=0, help="prefill in chunks of N tokens (0: off)")
    add("--dtype", choices=("bfloat16", "float32"), help="dtype of the model (as stored)")
    add("--quantize", choices=KINDS, help="int8 weights: half the memory of bfloat16 (off)")
    add("--mesh", default="", metavar="AXIS=N,...", help="mesh: expert=4,tensor=2 (one device)")
    add_distributed_flags(parser, whole)
    add("--stream", action="store_true", default=True, help="print text while generated (default)")
    add("--nostream", dest="stream", action="store_false", help="print only complete answers")
    add("--json", action="store_true", help="print one JSON object per answer, on one line")
    add("--draw", type=local, metavar="OUT.png", help="draw the boxes of the answer on an image")
    add("--draw_on", type=whole(1), metavar="N", help="number of that image, from 1 (last)")
    add("--raw_orientation", action="store_true", help="ignore EXIF orientation, as the original")
    add("--nocrop", action="store_true", help="encode only the global view of images, no tiles")
    add("--plan", action="store_true", help="print the memory needed, and stop")
    add("--verbose", action="store_true", help="print compilations and chosen implementations")
    cache = path_flag(remote=True, off=True)
    what = "compiled programs (~/.cache/vl2jax/jax)"
    add("--compilation_cache", type=cache, metavar="DIR|off", help=what)
    return parser


def parse_flags(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Parses and checks the flags.

    Args:
      argv: the command line without the name of the program; None: that of this process.
      description: text at the beginning of --help.

    Raises:
      UserError: an unknown flag, a wrong value, or a wrong combination of flags.
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
    """Raises UserError for a wrong combination of flags."""
    modes = [f"--{x}" for x in ("prompt", "messages", "batch") if getattr(args, x) is not None]
    is_batch, is_one = args.batch is not None, args.prompt is not None or args.messages is not None
    joins = args.distributed or args.coordinator
    for wrong, message in (
        (len(modes) > 1, f"{' and '.join(modes)} exclude each other; give only one"),
        (is_batch and args.out is None, "--batch needs --out, the file for the answers"),
        (args.out and not is_batch, "--out is only for --batch; --json prints to standard output"),
        (
            (args.process_index is None) != (args.process_count is None),
            "--process_index and --process_count must be given together",
        ),
        (args.process_count and not is_batch, "--process_count is only for --batch"),
        (
            args.process_count and args.process_index >= args.process_count,
            "--process_index must be below --process_count",
        ),
        (
            joins and not (modes or args.plan),
            "a chat runs in one process; give --prompt, --messages or --batch",
        ),
        (
            args.process_count and joins,
            "--process_count is for independent processes; leave it out with --distributed or"
            " --coordinator",
        ),
        (args.retry_errors and not is_batch, "--retry_errors is only for --batch"),
        (args.image and is_batch, "--image is not for --batch; name images in the rows"),
        (
            args.system and (is_batch or args.messages),
            "--system is only for --prompt and chat; put the system message into the file",
        ),
        (args.n > 1 and not modes, "--n needs --prompt, --messages or --batch"),
        (args.n > 1 and args.draw, "--draw shows the boxes of one answer; leave --n out"),
        (args.draw and not is_one, "--draw needs --prompt or --messages"),
        (args.draw_on and not is_one, "--draw_on needs --prompt or --messages"),
        (args.draw_on and not (args.draw or args.json), "--draw_on needs --draw or --json"),
    ):
        if wrong:
            raise UserError(message)


def _check_values(args: argparse.Namespace) -> None:
    """Raises UserError for values that no checkpoint supports, and for paths that do not exist."""
    sampling = SamplingParams.create(
        args.temperature, args.top_k, args.top_p, args.repetition_penalty
    )
    if args.n > 1 and sampling.greedy:
        raise UserError(f"--n {args.n} needs --temperature above 0; greedy answers are all equal")
    if "" in args.stop:
        raise UserError("--stop is empty; expected a stop string")
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
