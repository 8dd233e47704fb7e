"""Asks a converted checkpoint about pictures.

    python sample.py --ckpt DIR --image A.jpg --image B.png --prompt "What changed?"
    python sample.py --ckpt DIR --messages conversation.json --draw boxes.png
    python sample.py --ckpt DIR --batch questions.jsonl --out answers.jsonl
    python sample.py --ckpt DIR                     # an interactive chat

The answer, and nothing else, is written to standard output.  --messages is a JSON list of messages
in OpenAI's style or the original's, or an object with "messages" and "images"; an assistant's
message at its end is continued.  Each line of --batch is such an object, or has "prompt" and
"images", or is a row of training data (LLaVA's, also as one JSON list); there an answer at the end
is left out, and given anew.  A batch that ended early goes on where it stopped.  The exit code is 1
for a mistake, and for a batch with a bad row.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import jax

from vl2jax.answer_file import answer_file
from vl2jax.answer_output import Output, draw_answer, ground, image_number
from vl2jax.chat import Chat
from vl2jax.cli import run_cli
from vl2jax.compilation_cache import set_compilation_cache, show_compilations
from vl2jax.errors import UserError
from vl2jax.request import from_prompt, read_request
from vl2jax.sample_flags import parse_flags
from vl2jax.session import Session
from vl2jax.sharding import read_mesh


def run(args: argparse.Namespace) -> int:
    """Answers; the exit code."""
    names = "max_new_tokens temperature top_p top_k repetition_penalty stop seed chunk_size"
    session = Session(
        args.ckpt,
        dtype=args.dtype,
        mesh=read_mesh(args.mesh),
        quantize=args.quantize,
        crop=False if args.nocrop else None,
        exif=not args.raw_orientation,
        **{name: getattr(args, name) for name in names.split()},
    )
    set_compilation_cache(args.compilation_cache)
    if args.verbose:
        show_compilations()
    if args.plan:
        session.plan(args.batch_size if args.batch else 1)
        return 0
    if args.batch:
        if args.process_count is None:
            part = (jax.process_index(), jax.process_count())
        else:
            part = (args.process_index, args.process_count)
        return 1 if answer_file(session, args.batch, args.out, args.batch_size, part) else 0
    output = Output(as_json=args.json, stream=args.stream, draw_on=args.draw_on)
    if args.prompt is None and not args.messages:
        Chat(session, output, system=args.system, images=args.image).run()
    else:
        answer_one(session, output, args)
    return 0


def answer_one(session: Session, output: Output, args: argparse.Namespace) -> None:
    """Answers --prompt or --messages."""
    token = session.processor.tokenizer.image_token
    if args.messages:
        request = read_request(args.messages, image_token=token)
        if args.image and request.images is not None:
            raise UserError(f"--image, but {args.messages} has images of its own; give them once")
        if args.image:
            request = dataclasses.replace(request, images=args.image)
    else:
        request = from_prompt(args.prompt, args.image, system=args.system, image_token=token)
    sample = session.prepare(request)
    if args.draw or args.draw_on:
        number = image_number(sample, args.draw_on)
    generation = session.answer(sample, output.show)
    output.finish(generation, sample)
    if args.draw:
        found = ground(generation.text, sample, args.draw_on)
        draw_answer(args.draw, session.image_source(request, number), session.exif, found)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    return run_cli(
        lambda: run(parse_flags(argv, __doc__)),
        out_of_memory="--dtype bfloat16, --quantize int8, --chunk_size 512, a smaller"
        " --max_new_tokens or --batch_size, or fewer images",
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # whatever the locale
    raise SystemExit(main())
