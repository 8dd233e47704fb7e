"""Scores a checkpoint on questions with known answers.

    python eval.py --ckpt DIR --data synthetic
    python eval.py --ckpt DIR --data synthetic --families colour,grounding --questions 500 --json
    python eval.py --ckpt DIR --data synthetic --quantize int8
    python eval.py --ckpt DIR --data synthetic --distributed     # in each process of a job

DIR is the output of convert.to_jax, or a training workdir (its newest checkpoint).  The program
prints a table to standard output.  It writes scores.json, answers.jsonl (each question with its
answer) and sheet.png (some questions with their images) to the folder --out.  With --quantize, the
model answers the questions twice, without and with quantisation.  The table then has both scores
and their difference, and the second answers are in answers-int8.jsonl.  The measures are explained
in vl2jax/evaluation/scoring.py.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vl2jax.checkpoints.model_dir import read_model_dir
from vl2jax.cli.command import Parser, run_cli, whole
from vl2jax.cli.output import json_line
from vl2jax.cli.shards import (
    Shard,
    add_distributed_flags,
    check_same_flags,
    choose_shard,
    read_distributed_options,
)
from vl2jax.common.atomic_file import write_json
from vl2jax.common.compilation_cache import set_compilation_cache
from vl2jax.common.errors import UserError
from vl2jax.common.paths import is_remote, path_flag
from vl2jax.common.progress import Progress
from vl2jax.evaluation.comparison import difference, side_by_side
from vl2jax.evaluation.contact_sheet import Card, draw_sheet
from vl2jax.evaluation.scoring import (
    DATASETS,
    Dataset,
    Score,
    aggregate,
    answered_boxes,
    find_dataset,
    score,
)
from vl2jax.inference.generate import Generation, generate
from vl2jax.inference.request import Request
from vl2jax.inference.session import Session
from vl2jax.model.quantization import KINDS
from vl2jax.parallel.processes import (
    distributed,
    exit_process,
    gather_to_process_0,
    is_process_0,
    print_on_process_0,
)
from vl2jax.processing.collate import Sample
from vl2jax.processing.image import load_image
from vl2jax.synthetic import Question

WINDOW = 16  # number of batches whose questions are prepared and sorted together
CARDS = 6  # maximum number of cards per family on the sheet
MEASURES = {
    "exact_match": "exact match",
    "acc50": "Acc@0.5",
    "mean_iou": "mean IoU",
    "refused": "refused",
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The answer to one question, and its score.

    The question itself is not stored; it is generated again when needed.
    """

    family: str
    index: int
    text: str
    finish_reason: str
    score: Score


Ask = Callable[[str, int], Question]
Answer = Callable[[Sequence[Sample]], list[Generation]]


def run(args: argparse.Namespace) -> None:
    """Runs the evaluation, in one process or together with other processes."""
    with distributed(read_distributed_options(args)), print_on_process_0():
        check_same_flags(args)
        run_here(args, choose_shard(args.mesh, rows=True))


def run_here(args: argparse.Namespace, shard: Shard) -> None:
    """Evaluates the questions of this process; process 0 writes the results of all processes.

    Args:
      args: flags.
      shard: mesh of this process and its share of the questions.
    """
    dataset = find_dataset(args.data)
    split = dataset.check_split(args.split or dataset.splits[0])
    named = list(dataset.families) if args.families is None else args.families
    families = dataset.check_families(named)
    directory = read_model_dir(args.ckpt)
    if args.out is None and is_remote(args.ckpt):
        raise UserError(f"{args.ckpt} is on an object store; give --out, a local folder")
    out = args.out or directory.path / "eval"
    if is_process_0():
        out.mkdir(parents=True, exist_ok=True)
    set_compilation_cache(args.compilation_cache)

    def ask(family: str, index: int) -> Question:
        return dataset.question(family, index, split=split, seed=args.seed)

    questions = list(itertools.product(families, range(args.questions)))

    def evaluate(kind: str | None) -> tuple[list[Outcome], dict[str, Any]] | None:
        """Loads the model and evaluates it; returns None except on process 0.

        The model is freed before the function returns.
        """
        session = Session(directory.address, dtype=args.dtype, mesh=shard.mesh, quantize=kind)
        started = time.perf_counter()
        own = questions[shard.index :: shard.count]
        found = answer_all(session, ask, own, args.batch_size, args.max_new_tokens)
        if shard.count > 1:
            found = gather(f"outcomes/{kind}", found, questions)
        if not is_process_0():
            return None
        seconds = round(time.perf_counter() - started, 2)
        name = "answers.jsonl" if kind is None else f"answers-{kind}.jsonl"
        with (out / name).open("w", encoding="utf-8") as file:
            file.writelines(json_line(record(one, ask)) + "\n" for one in found)
        return found, {"seconds": seconds} | summarise(dataset, found)

    plain, other = evaluate(None), evaluate(args.quantize) if args.quantize else None
    if plain is None:
        return
    about = {"ckpt": str(args.ckpt), "step": directory.step, "data": args.data, "split": split}
    outcomes, found = plain
    scores = about | {"seed": args.seed} | found
    if other is not None:
        others, found = other
        same = sum(a.text == b.text for a, b in zip(outcomes, others, strict=True))
        scores[args.quantize] = found | {"same_answers": same}
        scores["difference"] = difference(scores, found)
    write_json(out / "scores.json", scores)
    title = f"{args.ckpt}" + (f" step {directory.step}" if directory.step is not None else "")
    sheet(f"{title}: {args.data} {split}", outcomes, ask).save(out / "sheet.png")
    if args.json:
        print(json.dumps(scores))
    elif args.quantize:
        print(side_by_side(scores, args.quantize, MEASURES, _figure))
    else:
        print(table(scores))
    names = ["scores.json", "answers.jsonl", "sheet.png"]
    names += [f"answers-{args.quantize}.jsonl"] if args.quantize else []
    print(f"{out}: {', '.join(names)}", file=sys.stderr)


def gather(
    name: str, outcomes: Sequence[Outcome], wanted: Sequence[tuple[str, int]]
) -> list[Outcome]:
    """Gathers the outcomes of all processes on process 0.

    Args:
      name: name of the message, unique in the run.
      outcomes: outcomes of this process.
      wanted: family and index of all questions.

    Returns:
      On process 0, one outcome for each of `wanted`, in its order; [] on other processes.
    """
    said = gather_to_process_0(name, json.dumps([dataclasses.asdict(one) for one in outcomes]))
    all_told = [record for text in said for record in json.loads(text)]
    found = [Outcome(**one | {"score": Score(**one["score"])}) for one in all_told]
    by_question = {(one.family, one.index): one for one in found}
    return [by_question[key] for key in wanted] if is_process_0() else []


def answer_all(
    session: Session,
    ask: Ask,
    wanted: Sequence[tuple[str, int]],
    batch_size: int,
    max_new_tokens: int,
) -> list[Outcome]:
    """Answers questions with greedy decoding, in batches of prompts of similar size.

    Args:
      session: session with the checkpoint.
      ask: generates a question.
      wanted: family and index of each question.
      batch_size: number of prompts in a batch.
      max_new_tokens: maximum number of tokens per answer.

    Returns:
      One outcome for each of `wanted`, in its order.

    Raises:
      UserError: a question does not fit the model, or an answer ended with an error.
    """
    model = session.load()
    processor = model.processor

    def answer(samples: Sequence[Sample]) -> list[Generation]:
        # A fixed number of rows and few numbers of tile slots, so that few programs are compiled.
        full = [*samples, *[samples[-1]] * (batch_size - len(samples))]
        tiles = sum(len(sample.tiles) for sample in full)
        batch = processor.collate(full, tile_slots=-(-tiles // batch_size) * batch_size)
        answers = generate(
            *(model.config, model.params, batch),
            max_new_tokens=max_new_tokens,
            tokenizer=processor.tokenizer,
            batch_size=batch_size,
        )[: len(samples)]
        for one in answers:
            if one.error is not None:
                raise UserError(one.error)
        return answers

    outcomes: dict[tuple[str, int], Outcome] = {}
    with Progress("answering", len(wanted), "questions") as progress:
        for start in range(0, len(wanted), WINDOW * batch_size):
            window = wanted[start : start + WINDOW * batch_size]
            for batch in answer_window(session, ask, window, batch_size, answer):
                outcomes |= {(one.family, one.index): one for one in batch}
                progress.update(len(batch))
    return [outcomes[key] for key in wanted]


def answer_window(
    session: Session,
    ask: Ask,
    window: Sequence[tuple[str, int]],
    batch_size: int,
    answer: Answer,
) -> Iterator[list[Outcome]]:
    """Answers the questions of a window, sorted by tiles and tokens.

    Args:
      session: session with the checkpoint.
      ask: generates a question.
      window: family and index of each question.
      batch_size: number of prompts in a batch.
      answer: answers a batch.

    Yields:
      The outcomes of each batch.

    Raises:
      UserError: a question does not fit the model.
    """
    prepared = []
    for family, index in window:
        question = ask(family, index)
        row = question.row
        try:
            sample = session.prepare(Request(list(row.messages), list(row.images)))
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        prepared.append((family, index, question, sample))
    prepared.sort(key=lambda one: (len(one[3].tiles), len(one[3])))
    for start in range(0, len(prepared), batch_size):
        group = prepared[start : start + batch_size]
        answers = answer([sample for *_, sample in group])
        yield [
            Outcome(
                family, index, said.text or "", said.finish_reason, score(question, said.text or "")
            )
            for (family, index, question, _), said in zip(group, answers, strict=True)
        ]


def by_family(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Groups outcomes by family."""
    found: dict[str, list[Outcome]] = {}
    for one in outcomes:
        found.setdefault(one.family, []).append(one)
    return found


def summarise(dataset: Dataset, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Aggregates scores, by family and in summary, in the form of scores.json."""
    scores = {name: [one.score for one in group] for name, group in by_family(outcomes).items()}
    return {
        "questions": len(outcomes),
        "summary": dataset.summarise(scores),
        "families": {name: aggregate(group) for name, group in scores.items()},
    }


def record(one: Outcome, ask: Ask) -> dict[str, Any]:
    """Converts an outcome to an entry of answers.jsonl; coordinates of boxes are 0 to 999."""
    question = ask(one.family, one.index)
    return {
        "family": one.family,
        "index": one.index,
        "question": question.row.messages[-1]["content"],
        "expected": question.answer,
        "answer": one.text,
        "finish_reason": one.finish_reason,
        **dataclasses.asdict(one.score),
        "expected_boxes": question.boxes,
        "answered_boxes": answered_boxes(one.text),
    }


def table(scores: dict[str, Any]) -> str:
    """Formats scores as a table."""
    lines = [f"{'family':18}{'questions':>10}" + "".join(f"{x:>13}" for x in MEASURES.values())]
    for name, found in scores["families"].items():
        cells = ("" if found[key] is None else _figure(key, found[key]) for key in MEASURES)
        lines.append(
            f"{name:18}{found['questions']:>10}" + "".join(f"{cell:>13}" for cell in cells)
        )
    for key, found in scores["summary"].items():
        names = ", ".join(found["families"])
        lines.append(f"{MEASURES[key]} over {names}: {_figure(key, found['value'])}")
    return "\n".join(line.rstrip() for line in lines)


def _figure(key: str, value: float) -> str:
    return f"{value:.3f}" if key == "mean_iou" else f"{value:.1%}"


def sheet(title: str, outcomes: Sequence[Outcome], ask: Ask):
    """Draws the contact sheet, with one row of wrong and correct answers per family."""
    rows = [
        [make_card(one, ask) for one in choose(group, CARDS)]
        for group in by_family(outcomes).values()
    ]
    right = sum(one.score.correct for one in outcomes)
    return draw_sheet(f"{title}, {right} of {len(outcomes)} correct", rows)


def choose(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """Chooses the first wrong and the first correct outcomes, half of each if possible."""
    wrong = [one for one in outcomes if not one.score.correct]
    right = [one for one in outcomes if one.score.correct]
    wrongs = min(len(wrong), max(count // 2, count - len(right)))
    return wrong[:wrongs] + right[: count - wrongs]


def make_card(one: Outcome, ask: Ask) -> Card:
    """Makes the card of an outcome for the contact sheet."""
    question = ask(one.family, one.index)
    return Card(
        name=f"{one.family} {one.index}",
        correct=one.score.correct,
        pictures=[load_image(image) for image in question.row.images],
        question=question.row.messages[-1]["content"].replace("<image>", "").strip(),
        expected=question.answer,
        answer=one.text,
        note="" if one.score.iou is None else f"IoU {one.score.iou:.2f}",
        true_boxes=question.boxes,
        answered_boxes=answered_boxes(one.text),
        boxes_image=question.boxes_image,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; raises UserError for a wrong flag."""
    parser = Parser("eval.py", __doc__)
    add = parser.add_argument
    what = "converted checkpoint or training workdir"
    add("--ckpt", type=path_flag(remote=True), required=True, metavar="DIR", help=what)
    add("--data", required=True, metavar="NAME", help=f"data set: {', '.join(DATASETS)}")
    add("--split", metavar="NAME", help="split of the data set (heldout)")
    add("--families", type=_names, metavar="A,B", help="families of questions (all)")
    add("--questions", type=whole(1), default=100, help="questions per family (100)")
    add("--seed", type=whole(0), default=0, help="seed of the questions (0)")
    add("--batch_size", type=whole(1), default=64, help="questions per batch (64)")
    add("--max_new_tokens", type=whole(1), default=192, help="maximum tokens per answer (192)")
    add("--dtype", choices=("bfloat16", "float32"), help="dtype of the model (as stored)")
    add("--quantize", choices=KINDS, help="also evaluate the quantised model and compare (off)")
    add("--mesh", default="", metavar="AXIS=N,...", help="mesh: expert=4,tensor=2 (one device)")
    add_distributed_flags(parser, whole)
    add("--out", type=path_flag(), metavar="DIR", help="folder for the results (CKPT/eval)")
    add("--json", action="store_true", help="print the scores as one JSON object")
    cache = path_flag(remote=True, off=True)
    what = "compiled programs (~/.cache/vl2jax/jax)"
    add("--compilation_cache", type=cache, metavar="DIR|off", help=what)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command line.

    Returns:
      The exit code: 0, 1 after an error, 130 after Ctrl-C.
    """
    return exit_process(
        run_cli(lambda: run(parse_flags(argv)), out_of_memory="a smaller --batch_size")
    )


def script() -> int:
    """Runs `eval.py` or `vl2jax-eval` with the command line of this process."""
    gc.freeze()  # so that garbage collections skip the objects that the imports created
    return main()
