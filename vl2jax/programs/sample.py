"""Asks a converted checkpoint questions about images.

    python sample.py --ckpt DIR --image A.jpg --image B.png --prompt "What changed?"
    python sample.py --ckpt DIR --messages conversation.json --draw boxes.png
    python sample.py --ckpt DIR --batch questions.jsonl --out answers.jsonl
    python sample.py --ckpt DIR                     # an interactive chat
    python sample.py --ckpt DIR --mesh expert=8 --distributed --prompt ...   # on many hosts

Only answers are written to standard output.

--messages is a file with one conversation, in any format of training data.  If the last message is
the assistant's, the model continues it.

The rows of --batch have any format of training data, or are objects with "prompt" and "images", in
any kind of data file (JSON, JSON lines, parquet, ...).  If a row ends with an answer, the answer is
removed and generated again.  An interrupted batch is resumed by the same command; with
--retry_errors, rows that had an error are answered again.

The exit code is 1 after an error, and after a batch with a bad row.
"""

import argparse
import gc
import io
import sys
from collections.abc import Sequence

import jax

from vl2jax.cli.batch import answer_batch
from vl2jax.cli.batch_processes import answer_batch_by_processes
from vl2jax.cli.chat import Chat
from vl2jax.cli.command import run_cli
from vl2jax.cli.output import Output
from vl2jax.cli.sample_flags import parse_flags
from vl2jax.cli.shards import Shard, check_same_flags, choose_shard, read_distributed_options
from vl2jax.cli.verbose import print_compilations_and_choices
from vl2jax.common.compilation_cache import set_compilation_cache
from vl2jax.common.errors import UserError
from vl2jax.data.unread import UnreadKeys
from vl2jax.inference.request import Request, from_prompt, read_request
from vl2jax.inference.session import Session
from vl2jax.parallel.processes import (
    distributed,
    exit_process,
    is_process_0,
    print_on_process_0,
)


def run(args: argparse.Namespace) -> int:
    """Runs the program, in one process or together with other processes; returns the exit code."""
    with distributed(read_distributed_options(args)), print_on_process_0():
        check_same_flags(args)
        return run_here(args, choose_shard(args.mesh, rows=args.batch is not None))


def run_here(args: argparse.Namespace, shard: Shard) -> int:
    """Runs the part of this process.

    Args:
      args: flags.
      shard: mesh of this process and its share of the rows.

    Returns:
      The exit code.
    """
    names = "max_new_tokens temperature top_p top_k repetition_penalty stop seed chunk_size"
    session = Session(
        args.ckpt,
        dtype=args.dtype,
        mesh=shard.mesh,
        quantize=args.quantize,
        crop=False if args.nocrop else None,
        exif=not args.raw_orientation,
        **{name: getattr(args, name) for name in names.split()},
        **({"n": args.n} if args.n > 1 else {}),
    )
    set_compilation_cache(args.compilation_cache)
    if args.verbose:
        print_compilations_and_choices()
    if args.plan:
        session.plan(args.batch_size if args.batch else 1)
        return 0
    if args.batch:
        files, retry = (args.batch, args.out, args.batch_size), {"retry_errors": args.retry_errors}
        if jax.process_count() > 1:
            return 1 if answer_batch_by_processes(session, *files, shard, **retry) else 0
        part = (args.process_index or 0, args.process_count or 1)
        return 1 if answer_batch(session, *files, part, **retry) else 0
    output = Output(
        as_json=args.json,
        stream=args.stream,
        draw=args.draw if is_process_0() else None,
        draw_on=args.draw_on,
        exif=session.exif,
    )
    if args.prompt is None and not args.messages:
        Chat(session, output, system=args.system, images=args.image).run()
    else:
        answer_one(session, output, args)
    return 0


def answer_one(session: Session, output: Output, args: argparse.Namespace) -> None:
    """Answers --prompt or --messages, --n times.

    Raises:
      UserError: the request is wrong, or an answer ended with an error; the others are printed.
    """
    sample = session.prepare(read_one(args))
    output.check(sample)
    if args.n == 1:
        output.finish(session.answer(sample, output.show), sample)
        return
    failed = []
    for generation in session.answers(sample, args.batch_size):
        output.show(generation.text or "")
        try:
            output.finish(generation, sample)
        except UserError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def read_one(args: argparse.Namespace) -> Request:
    """Reads the request of --prompt or --messages."""
    if not args.messages:
        return from_prompt(args.prompt, args.image, system=args.system)
    request = read_request(args.messages, args.image)
    said = UnreadKeys(lambda message: print(message, file=sys.stderr))
    said.add(str(args.messages), request.unread)
    return request


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command line.

    Returns:
      The exit code: 0, 1 after an error, 130 after Ctrl-C.
    """
    code = run_cli(
        lambda: run(parse_flags(argv, __doc__)),
        out_of_memory="--dtype bfloat16, --quantize int8, --chunk_size 512, a smaller"
        " --max_new_tokens or --batch_size, or fewer images",
    )
    return exit_process(code)


def script() -> int:
    """Runs `sample.py` or `vl2jax-sample` with the command line of this process."""
    gc.freeze()  # so that garbage collections skip the objects that the imports created
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # independent of the locale
    return main()
