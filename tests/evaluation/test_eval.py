"""eval.py as a user runs it: files, output, and errors."""

import dataclasses
import json
import re

import jax.numpy as jnp
import PIL.Image
import pytest

from convert import random_hf, to_jax
from vl2jax.checkpoints.completeness import CHECKPOINTS, PARAMS, seal
from vl2jax.evaluation import scoring
from vl2jax.evaluation.contact_sheet import RIGHT, WRONG
from vl2jax.evaluation.scoring import Score
from vl2jax.inference.generate import Generation
from vl2jax.inference.session import Session
from vl2jax.programs import eval as program
from vl2jax.synthetic import FAMILIES, question

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = ("--data", "synthetic", "--dtype", "float32", "--max_new_tokens", 4, "--batch_size", 8)
OFF = ("--compilation_cache", "off")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A random model with the tokenizer of `random_hf`, which can encode any text."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "hf").mkdir()
    random_hf.write_checkpoint(folder / "hf")
    to_jax.convert(folder / "hf", folder / "ckpt")
    return folder / "ckpt"


@pytest.fixture
def evaluate(ckpt, tmp_path, capsys):
    """`evaluate(*flags)`: exit code, standard output and standard error."""

    def run(*flags, ckpt=ckpt, out=tmp_path / "out"):
        where = [] if out is None else ["--out", str(out)]
        code = program.main(["--ckpt", str(ckpt), *where, *OFF, *map(str, flags)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def answering(monkeypatch):
    """`answering(function)`: replaces the model's answers by `function(question)`."""

    def script(function):
        def answer_window(session, ask, window, batch_size, _, _real=program.answer_window):
            asked, said = [], {}

            def remember(family, index):
                asked.append(ask(family, index))
                return asked[-1]

            def prepare(self, request, _real=Session.prepare):
                sample = _real(self, request)
                said[id(sample)] = function(asked[-1])
                return sample

            def answer(samples):
                return [Generation([1], "stop", said[id(s)], len(s), 0.1, 1.0) for s in samples]

            with monkeypatch.context() as patch:
                patch.setattr(Session, "prepare", prepare)
                yield from _real(session, remember, window, batch_size, answer)

        monkeypatch.setattr(program, "answer_window", answer_window)

    return script


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sheet_of(folder):
    with PIL.Image.open(folder / "sheet.png") as picture:
        return picture.convert("RGB")


def test_a_random_model(evaluate, tmp_path):
    flags = (*SMALL, "--families", "grounding,colour,three_images", "--questions", 4)
    code, out, err = evaluate(*flags)
    assert code == 0
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines()]
    assert rows[0] == ["family", "questions", "exact match", "Acc@0.5", "mean IoU", "refused"]
    assert rows[1] == ["grounding", "4", "0.0%", "0.0%", "0.000"]
    assert rows[2:4] == [["colour", "4", "0.0%"], ["three_images", "4", "0.0%"]]
    assert out.splitlines()[4:] == [
        "exact match over colour: 0.0%",
        "Acc@0.5 over grounding: 0.0%",
    ]
    assert "12 of 12 questions" in err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(scores["families"]) == ["grounding", "colour", "three_images"]
    assert scores["questions"] == 12 and scores["step"] is None
    found = lines(tmp_path / "out" / "answers.jsonl")
    asked = [("grounding", 0), ("grounding", 3), ("colour", 0), ("three_images", 3)]
    assert [(found[i]["family"], found[i]["index"]) for i in (0, 3, 4, 11)] == asked
    for one in found:
        expected = question(one["family"], one["index"])
        assert one["question"] == expected.row.messages[0]["content"]
        assert one["expected"] == expected.answer
        assert one["correct"] is False and one["finish_reason"] in ("length", "stop")
    assert sum(bool(one["answer"]) for one in found) > 6
    assert found[0]["expected_boxes"] == [list(box) for box in question("grounding", 0).boxes]
    assert sheet_of(tmp_path / "out").size[0] == 4 * 270 + 10


def test_answers_do_not_depend_on_the_batches(evaluate, tmp_path):
    """With another batch size, each question gets the same answer."""
    flags = ("--families", "text,chart,three_images", "--questions", 3)
    assert evaluate(*SMALL, *flags, out=tmp_path / "a")[0] == 0
    assert evaluate(*SMALL, *flags, "--batch_size", 2, out=tmp_path / "b")[0] == 0
    together, apart = (lines(tmp_path / name / "answers.jsonl") for name in "ab")
    assert together == apart
    assert len({one["answer"] for one in together}) > 3


def test_json_is_all_that_goes_to_standard_output(evaluate, tmp_path):
    code, out, _ = evaluate(*SMALL, "--families", "digit", "--questions", 2, "--json")
    assert code == 0 and out.count("\n") == 1
    found = json.loads(out)
    assert found == json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (found["data"], found["split"], found["seed"]) == ("synthetic", "heldout", 0)
    assert found["families"]["digit"]["exact_match"] == 0.0
    assert found["families"]["digit"]["mean_iou"] is None
    assert found["summary"]["exact_match"]["families"] == ["digit"]


def test_the_oracle_is_always_right(evaluate, answering, tmp_path):
    answering(lambda asked: asked.answer)
    code, out, _ = evaluate(*SMALL, "--questions", 3, "--json")
    found = json.loads(out)
    assert code == 0 and list(found["families"]) == list(FAMILIES)
    for name, one in found["families"].items():
        assert (one["questions"], one["correct"], one["exact_match"]) == (3, 1.0, 1.0), name
        is_box = name in ("grounding", "grounded_caption", "in_context")
        assert (one["acc50"], one["mean_iou"]) == ((1.0, 1.0) if is_box else (None, None))
        assert one["refused"] == (1.0 if name == "absent" else None)
    assert {key: one["value"] for key, one in found["summary"].items()} == {
        "exact_match": 1.0,
        "acc50": 1.0,
        "refused": 1.0,
    }
    sheet = sheet_of(tmp_path / "out")
    assert {sheet.getpixel((10 + 270 * i, 74)) for i in range(3)} == {RIGHT}


def spoil(asked):
    """A wrong text, boxes shifted right by a fifth of their width, or "yes" for a refusal."""
    if asked.kind == "absent":
        return "yes"
    if asked.kind == "text":
        return "a mistake"
    text = asked.answer
    for x0, y0, x1, y1 in asked.boxes:
        by = (x1 - x0) / 5
        text = text.replace(f"[{x0}, {y0}, {x1}, {y1}]", f"[{x0 + by}, {y0}, {x1 + by}, {y1}]")
    return text


def test_known_mistakes_have_known_scores(evaluate, answering, tmp_path):
    answering(spoil)
    flags = ("--families", "colour,grounding,absent", "--questions", 5, "--json")
    code, out, _ = evaluate(*SMALL, *flags)
    found = json.loads(out)["families"]
    assert code == 0
    assert found["colour"]["correct"] == found["colour"]["exact_match"] == 0.0
    assert found["absent"]["refused"] == found["absent"]["correct"] == 0.0
    assert found["grounding"]["exact_match"] == 0.0
    assert found["grounding"]["acc50"] == found["grounding"]["correct"] == 1.0
    assert found["grounding"]["mean_iou"] == pytest.approx(0.8 / 1.2, abs=1e-3)


def test_right_and_wrong_are_mixed_on_the_sheet(evaluate, answering, tmp_path):
    wrong = {question("colour", i).answer for i in (0,)}
    answering(lambda asked: "no" if asked.answer in wrong else asked.answer)
    assert evaluate(*SMALL, "--families", "colour", "--questions", 20)[0] == 0
    sheet = sheet_of(tmp_path / "out")
    heads = [sheet.getpixel((10 + 270 * i, 74)) for i in range(6)]
    count = min(3, sum(question("colour", i).answer in wrong for i in range(20)))
    assert count >= 1 and heads == [WRONG] * count + [RIGHT] * (6 - count)


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        ("RWRWRWRWRW", [1, 3, 5, 0, 2, 4]),
        ("R" * 8, [0, 1, 2, 3, 4, 5]),
        ("WWWWWWWR", [*range(5), 7]),
    ],
)
def test_chosen_cards(right, expected):
    outcomes = [
        program.Outcome("colour", i, "", "stop", Score(letter == "R", letter == "R"))
        for i, letter in enumerate(right)
    ]
    assert [one.index for one in program.choose(outcomes, 6)] == expected


def test_batches_are_full_and_of_one_shape(ckpt, monkeypatch):
    """All batches have the same number of rows, and few numbers of tiles."""
    shapes = []

    def generate(config, params, batch, **options):
        shapes.append((batch.tokens.shape[0], batch.tiles.shape[0]))
        said = Generation([1], "stop", "red", 9, 0.1, 1.0)
        return [said] * batch.tokens.shape[0]

    monkeypatch.setattr(program, "generate", generate)
    session = Session(ckpt, dtype="float32")
    wanted = [(family, i) for family in ("text", "colour", "in_context") for i in range(6)]
    outcomes = program.answer_all(session, question, wanted, 4, 5)
    assert [(one.family, one.index) for one in outcomes] == wanted
    assert [rows for rows, _ in shapes] == [4] * 5
    assert all(tiles % 4 == 0 for _, tiles in shapes) and shapes[0] == (4, 0)
    assert sorted(tiles for _, tiles in shapes) == [tiles for _, tiles in shapes]


def test_a_training_workdir(evaluate, ckpt, tmp_path):
    """Evaluates the newest step of the workdir and writes the results there."""
    workdir = tmp_path / "run"
    for step in (5, 20):
        (workdir / CHECKPOINTS / str(step)).mkdir(parents=True)
        (workdir / CHECKPOINTS / str(step) / PARAMS).symlink_to(ckpt / PARAMS)
        seal(workdir / CHECKPOINTS / str(step))
    for file in ckpt.glob("*.json"):
        (workdir / file.name).symlink_to(file)
    flags = (*SMALL, "--families", "text", "--questions", 2, "--json")
    code, out, _ = evaluate(*flags, ckpt=workdir, out=None)
    assert code == 0 and json.loads(out)["step"] == 20
    names = sorted(path.name for path in (workdir / "eval").iterdir())
    assert names == ["answers.jsonl", "scores.json", "sheet.png"]
    code, out, _ = evaluate(*flags, ckpt=workdir / CHECKPOINTS / "5", out=None)
    assert code == 0 and json.loads(out)["step"] == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "coco"), "no data 'coco'; there is synthetic"),
        (("--data", "synthetic", "--split", "val"), "no split 'val'; there are heldout, "),
        (("--data", "synthetic", "--families", "color"), "no family 'color'; there are colour, "),
        (("--data", "synthetic", "--families", ","), "no family is named"),
        (
            ("--data", "synthetic", "--questions", "0"),
            "argument --questions: expected a whole number from 1 to 2147483647, got '0'",
        ),
        (
            ("--data", "synthetic", "--batch_size", "x"),
            "argument --batch_size: expected a whole number from 1 to 2147483647, got 'x'",
        ),
        (("--data", "synthetic", "--nonsense"), "unrecognized arguments: --nonsense"),
        ((), "the following arguments are required: --data"),
    ],
)
def test_a_mistake_gives_one_line(evaluate, flags, message):
    code, out, err = evaluate(*flags)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_no_checkpoint(evaluate, tmp_path):
    code, out, err = evaluate(*SMALL, ckpt=tmp_path / "none")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: checkpoint {tmp_path / 'none'} does not exist")
    (tmp_path / "file").write_text("x")
    code, out, err = evaluate(*SMALL, out=tmp_path / "file")
    assert (code, out, err.count("\n")) == (1, "", 1) and str(tmp_path / "file") in err


def test_a_question_that_does_not_fit_is_named(evaluate, monkeypatch):
    narrow = dataclasses.replace(scoring.DATASETS["synthetic"], question=long_question)
    monkeypatch.setattr(scoring, "DATASETS", {"synthetic": narrow})
    code, out, err = evaluate(*SMALL, "--families", "text", "--questions", 1)
    assert (code, out) == (1, "")
    assert re.search(r"^error: here 0: the prompt has \d+ tokens", err, re.MULTILINE)


def long_question(family, index, split, seed):
    asked = question(family, index, split, seed)
    message = {"role": "user", "content": "x " * 5000}
    row = dataclasses.replace(asked.row, messages=(message,), where=f"here {index}")
    return dataclasses.replace(asked, row=row)


def test_the_dtype_is_that_of_the_checkpoint(ckpt):
    assert Session(ckpt).load().params["params"]["decoder"]["norm"]["scale"].dtype == jnp.bfloat16
