"""sample.py as a user runs it: answers, files, the chat, and bad input."""

import base64
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zlib

import PIL.Image
import pytest
from conftest import ROOT

from convert import random_hf, to_jax
from vl2jax.checkpoints.completeness import seal
from vl2jax.cli import output as answer_output
from vl2jax.inference.generate import Generation
from vl2jax.inference.request import Request
from vl2jax.inference.session import Session
from vl2jax.programs import sample

QUESTION = "OCR see | 图片里有什么 a f(x): no or you"
# The original's answer to QUESTION about one_image_0_0.png, from golden.json.
GOLDEN = [
    *(148, 197, 240, 455, 34, 322, 82, 483, 564, 159, 182, 544),
    *(279, 269, 511, 34, 146, 527, 257, 148, 283, 555, 269, 362),
]


@pytest.fixture(scope="session")
def source(data_dir):
    return data_dir / "mini-small"


@pytest.fixture(scope="session")
def ckpt(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("sample") / "ckpt"
    to_jax.convert(source, target)
    return target


@pytest.fixture(scope="session")
def picture(source):
    return source / "golden" / "images" / "one_image_0_0.png"


@pytest.fixture
def ask(ckpt, capsys):
    """`ask(*flags)`: exit code, standard output and standard error of sample.py."""

    def run(*flags, ckpt=ckpt):
        code = sample.main(["--ckpt", str(ckpt), *map(str, flags)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(ask):
    """`refused(*flags)`: the one-line error message of sample.py."""

    def run(*flags, **options):
        code, out, err = ask(*flags, **options)
        assert (code, out) == (1, "")
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        return err

    return run


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(text)`: replaces the answers of the model by `text`."""

    def script(text, interrupt=False):
        asked = []

        def answer(self, prepared, show):
            asked.append(prepared)
            show(text)
            if interrupt:
                raise KeyboardInterrupt
            return Generation([5, 6], "stop", text, len(prepared), 0.25, 4.0)

        monkeypatch.setattr(Session, "answer", answer)
        return asked

    return script


def test_json_has_the_tokens_of_the_original(ask, picture):
    flags = ["--max_new_tokens", 24, "--dtype", "float32", "--json"]
    code, out, err = ask("--image", picture, "--prompt", QUESTION, *flags)
    assert code == 0 and out.count("\n") == 1
    answer = json.loads(out)
    assert answer["tokens"] == GOLDEN
    assert answer["finish_reason"] == "length"
    assert (answer["prompt_tokens"], answer["image_tokens"]) == (60, 21)
    assert (answer["boxes"], answer["boxes_refused"]) == ([], [])
    assert answer["seconds_to_first_token"] > 0 and answer["tokens_per_second"] > 0
    assert set(answer) == {
        *("text", "tokens", "finish_reason", "prompt_tokens", "image_tokens", "boxes"),
        *("boxes_refused", "seconds_to_first_token", "tokens_per_second"),
    }
    assert "466,227 parameters, float32, 1.86 MB on cpu" in err


def test_streamed_and_whole_text_are_the_same(ask, picture):
    flags = ["--image", picture, "--prompt", f"<image>\n{QUESTION}", "--max_new_tokens", 24]
    _, streamed, _ = ask(*flags)
    _, whole, _ = ask(*flags, "--nostream")
    assert streamed == whole
    assert whole.startswith("\ufffd\t\ufffd desCtrs descr") and whole.endswith("\ufffdor    or\n")


def test_a_stop_string_ends_the_answer_and_is_cut_off(ask, picture):
    flags = ["--image", picture, "--prompt", QUESTION, "--max_new_tokens", 24]
    _, out, _ = ask(*flags, "--stop", "never", "--stop", "sCt")
    assert out == "\ufffd\t\ufffd de\n"
    _, out, _ = ask(*flags, "--stop", "sCt", "--json")
    assert json.loads(out)["finish_reason"] == "stop"
    assert json.loads(out)["tokens"] == GOLDEN[:6]


def test_a_seed_decides_the_draws(ask):
    def draw(seed):
        flags = ["--temperature", 2, "--top_k", 50, "--top_p", 0.9, "--repetition_penalty", 1.1]
        _, out, _ = ask("--prompt", "hello", "--max_new_tokens", 12, "--seed", seed, *flags)
        return out

    assert draw(1) == draw(1) != draw(2)


def test_numbers_beyond_the_model_mean_all_that_it_has(ask, picture):
    flags = ["--image", picture, "--prompt", QUESTION, "--max_new_tokens", 2**31 - 1]
    _, out, _ = ask(*flags, "--chunk_size", 2**31 - 1, "--stop", "sCt", "--nostream")
    assert out == "\ufffd\t\ufffd de\n"


def original_style(image):
    content = f"<image>\n{QUESTION}"
    return [
        {"role": "<|User|>", "content": content, "images": [image]},
        {"role": "<|Assistant|>", "content": ""},
    ]


def openai_style(url):
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]
    return {"messages": [{"role": "user", "content": parts}]}


@pytest.mark.parametrize("style", [original_style, openai_style])
def test_messages_in_both_styles_beside_their_images(ask, picture, tmp_path, style):
    shutil.copy(picture, tmp_path / "here.png")
    file = tmp_path / "talk.json"
    file.write_text(json.dumps(style("here.png")))
    code, out, _ = ask("--messages", file, "--max_new_tokens", 24, "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == GOLDEN


def test_batch_keeps_the_order_and_reports_bad_rows(ask, picture, tmp_path):
    shutil.copy(picture, tmp_path / "here.png")
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    rows = [
        {"prompt": QUESTION, "images": ["here.png"], "id": "first"},
        {"conversation": original_style("here.png")},
        "{broken",
        {"messages": [{"role": "robot", "content": "hi"}], "id": 7},
        openai_style(url),
        {"prompt": "<image> and <image>", "image": "here.png"},
        {"prompt": "text", "messages": []},
        {"prompt": "half a character \ud83d"},
    ]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]))
    target = tmp_path / "out.jsonl"
    flags = ["--batch", tmp_path / "in.jsonl", "--out", target, "--batch_size", 2]
    code, out, err = ask(*flags, "--max_new_tokens", 24)
    assert (code, out) == (1, "")
    assert f"{target}: 8 rows, 5 of them with an error" in err
    answers = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [answer["row"] for answer in answers] == [1, 2, 4, 5, 6, 7, 8, 9]
    assert [answer.get("id") for answer in answers] == ["first", None, None, 7, *[None] * 4]
    assert [answer.get("tokens") for answer in answers] == [
        *(GOLDEN, GOLDEN, None, None),
        *(GOLDEN, None, None, None),
    ]
    messages = {a["row"]: a["error"]["message"] for a in answers if "error" in a}
    assert messages[4].startswith("not valid JSON")
    assert messages[5].startswith("message 1: unknown role 'robot'")
    assert messages[7].startswith("2 <image> in the text but 1 images")
    assert "got ['messages', 'prompt'] together" in messages[8]
    assert messages[9].startswith("a text is not valid Unicode")


BOX = "<|ref|>the square<|/ref|><|det|>[[0, 0, 499, 999]]<|/det|>"


def test_boxes_are_drawn_on_the_last_image_or_the_chosen_one(ask, scripted, tmp_path):
    PIL.Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    PIL.Image.new("RGB", (200, 100)).save(tmp_path / "b.png")
    target = tmp_path / "boxes.png"
    scripted(BOX)
    flags = ["--image", tmp_path / "a.png", "--image", tmp_path / "b.png", "--prompt", "where?"]
    code, out, err = ask(*flags, "--draw", target, "--json")
    assert code == 0
    assert json.loads(out)["boxes"] == [{"label": "the square", "box": [0, 0, 99, 100]}]
    assert err == f"{target}: 1 box drawn\n"
    with PIL.Image.open(target) as drawn:
        assert drawn.size == (200, 100)
        assert drawn.getpixel((99, 60)) == (255, 0, 0)
        assert drawn.getpixel((150, 60)) == (0, 0, 0)
    _, out, _ = ask(*flags, "--draw", target, "--draw_on", 1, "--json")
    assert json.loads(out)["boxes"] == [{"label": "the square", "box": [0, 0, 9, 10]}]
    with PIL.Image.open(target) as drawn:
        assert drawn.size == (20, 10)


def test_refused_boxes_are_explained(ask, scripted, picture, tmp_path):
    flags = ["--image", picture, "--prompt", "where?", "--draw", tmp_path / "boxes.png"]
    scripted(BOX.replace("999", "x"))
    _, _, err = ask(*flags)
    assert "0 boxes drawn: '[0, 0, 499, x]' of 'the square': 'x' is not a decimal number" in err
    scripted("no boxes here")
    _, _, err = ask(*flags)
    assert "0 boxes drawn: the answer has no <|ref|>" in err


def test_several_answers(ask):
    """One object or text per answer; the first is that of the same seed alone."""
    flags = ["--prompt", "hello", "--max_new_tokens", 6, "--temperature", 1, "--seed", -(2**63)]
    flags += ["--top_k", 10**30]
    code, out, _ = ask(*flags, "--n", 3, "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len({tuple(one["tokens"]) for one in told}) == len(told) == 3
    _, alone, _ = ask(*flags, "--json")
    assert json.loads(alone)["tokens"] == told[0]["tokens"]
    _, text, _ = ask(*flags, "--n", 3)
    assert text == "".join(one["text"] + "\n" for one in told)


@pytest.mark.parametrize("as_json", [False, True])
def test_an_answer_that_ends_with_an_error(ask, monkeypatch, as_json):
    """Its text so far is printed, the error is one line, and the exit code is 1."""

    def answer(self, prepared, show):
        show("so far")
        return Generation([5], "error", "so far", len(prepared), 0.25, 0.0, "logits are not finite")

    monkeypatch.setattr(Session, "answer", answer)
    code, out, err = ask("--prompt", "a", *(["--json"] if as_json else []))
    assert code == 1 and err == "error: logits are not finite\n"
    if as_json:
        told = json.loads(out)
        assert told["finish_reason"] == "error" and told["text"] == "so far"
        assert told["error"] == {"message": "logits are not finite"}
    else:
        assert out == "so far\n"


def test_exif_orientation_counts_unless_it_is_refused(ask, scripted, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    PIL.Image.new("RGB", (60, 30)).save(tmp_path / "turned.jpg", exif=exif)
    asked = scripted("yes")
    flags = ["--image", tmp_path / "turned.jpg", "--prompt", "upright?"]
    ask(*flags)
    ask(*flags, "--raw_orientation", "--nocrop")
    assert [prepared.image_sizes for prepared in asked] == [((30, 60),), ((60, 30),)]
    assert [prepared.image_tiles for prepared in asked] == [((1, 2),), ((1, 1),)]


@pytest.fixture
def chat(ask, monkeypatch):
    """`chat(lines, *flags)`: sample.py with these lines as its input."""

    def run(lines, *flags):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return ask("--max_new_tokens", 8, *flags)

    return run


def test_chat_answers_keeps_its_history_and_saves_it(chat, ask, picture, tmp_path):
    saved = tmp_path / "talk.json"
    lines = [f"/image '{picture}'", QUESTION, "", "and more?", f"/save {saved}", "/quit", "unread"]
    code, out, err = chat(lines)
    assert code == 0
    assert f"{picture}: " in err and "saved 4 messages" in err and "error" not in err
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == f"<image>\n{QUESTION}"
    assert messages[0]["images"] == [str(picture)] and messages[2]["images"] == []
    assert out == f"{messages[1]['content']}\n{messages[3]['content']}\n"
    # The saved conversation without its last answer gets the same answer.
    (tmp_path / "again.json").write_text(json.dumps(messages[:3]))
    _, again, _ = ask("--messages", tmp_path / "again.json", "--max_new_tokens", 8)
    assert again == f"{messages[3]['content']}\n"


def test_chat_survives_mistakes(chat, scripted, picture, tmp_path):
    asked = scripted("<image> fine")  # the next turn must not count this placeholder
    taken = tmp_path / "taken.txt"
    taken.write_text("keep me")
    lines = [
        *("/image", "/image absent.png", "/dance", "/save", f"/save {taken}"),
        *("look <image> <image>", "word " * 5000, "one <image>", "two", "/reset", "three"),
    ]
    code, out, err = chat(lines, "--image", picture, "--system", "Be brief.")
    assert code == 0
    assert out == "<image> fine\n" * 3
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    expected = (
        "/image needs the path",
        f"{pathlib.Path('absent.png').absolute()}: cannot open the picture",
        "unknown command '/dance'",
        "/save needs the path",
        f"{taken} exists",
        "2 <image> placeholders but 1 images",
        "the prompt has ",
    )
    assert len(errors) == len(expected)
    for error, start in zip(errors, expected, strict=True):
        assert error.startswith(f"error: {start}")
    assert taken.read_text() == "keep me"
    assert [len(prepared.image_sizes) for prepared in asked] == [1, 1, 0]
    assert [prepared.display.startswith("system: Be brief.") for prepared in asked] == [True] * 3
    assert asked[1].display.count("fine") == 1 and "fine" not in asked[2].display


def test_an_interrupt_stops_the_answer_not_the_chat(chat, scripted, tmp_path):
    scripted("so f", interrupt=True)
    code, out, err = chat(["go on", f"/save {tmp_path / 'talk.json'}"])
    assert (code, out) == (0, "so f\n") and "stopped" in err
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert messages[1] == {"role": "assistant", "content": "so f"}
    scripted("", interrupt=True)
    chat(["go on", f"/save {tmp_path / 'nothing.json'}"])
    assert json.loads((tmp_path / "nothing.json").read_text()) == {"messages": []}


def test_an_interrupt_ends_a_single_answer(ask, scripted):
    scripted("so f", interrupt=True)
    assert ask("--prompt", "go on") == (130, "so f", "\ninterrupted\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tempreature", "1"], "unknown argument '--tempreature'; did you mean --temperature?"),
        (["--prompt"], "argument --prompt: expected one argument"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "a", "--messages", "b"], "--prompt and --messages exclude each other"),
        (["--batch", "a"], "--batch needs --out"),
        (["--batch", "a", "--out", "b", "--image", "c"], "--image is not for --batch"),
        (["--batch", __file__, "--out", "/tmp"], "--out /tmp: is a directory"),
        (["--batch", __file__, "--out", "no/such/b"], "there is no directory no/such"),
        (["--out", "b"], "--out is only for --batch"),
        (["--messages", "a", "--system", "b"], "--system is only for --prompt and chat"),
        (["--messages", "absent.json"], "--messages absent.json does not exist"),
        (["--batch", "/tmp", "--out", "b"], "--batch /tmp is a directory"),
        (["--draw", "a.png"], "--draw needs --prompt or --messages"),
        (["--prompt", "a", "--draw", "a.xyz"], "--draw a.xyz: unknown image format"),
        (["--prompt", "a", "--draw", "a.png"], "the conversation has none"),
        (["--prompt", "a", "--draw_on", "1"], "--draw_on needs --draw or --json"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be 0 (greedy) or more"),
        (["--prompt", "a", "--temperature", "nan"], "temperature must be 0 (greedy) or more"),
        (["--prompt", "a", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
        (["--prompt", "a", "--top_p", "0"], "top_p must be above 0"),
        (["--batch", __file__, "--out", os.devnull], "/null: is a device or a pipe; expected"),
        (
            ["--prompt", "a", "--top_k", "-1"],
            "--top_k: expected a whole number from 0, got '-1'",
        ),
        (["--prompt", "a", "--repetition_penalty", "0"], "repetition_penalty must be above 0"),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens: expected a whole number"),
        (["--prompt", "a", "--chunk_size", "1.5"], "--chunk_size: expected a whole number"),
        (["--prompt", "a", "--seed", str(2**64)], "--seed: expected a whole number from -9223"),
        (["--prompt", "a", "--n", "0"], "--n: expected a whole number from 1"),
        (["--prompt", "a", "--n", "2"], "--n 2 needs --temperature above 0"),
        (["--n", "2", "--temperature", "1"], "--n needs --prompt, --messages or --batch"),
        (
            [*("--prompt", "a", "--n", "2", "--temperature", "1"), "--draw", "a.png"],
            "--draw shows the boxes of one answer",
        ),
        (["--prompt", "a", "--batch_size", "0"], "--batch_size: expected a whole number from 1"),
        (["--prompt", "a", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
        (["--prompt", "half \udce4"], "a text is not valid Unicode"),
    ],
)
def test_wrong_flags(refused, flags, message):
    assert message in refused(*flags)


def test_wrong_checkpoints(refused, ckpt, source, tmp_path):
    flags = ["--prompt", "hi"]
    assert "does not exist" in refused(*flags, ckpt=tmp_path / "absent")
    assert "is a file, not a directory" in refused(*flags, ckpt=source / "config.json")
    assert "is not a vl2jax checkpoint: no model.json" in refused(*flags, ckpt=tmp_path)
    assert "python -m convert.to_jax" in refused(*flags, ckpt=source)
    small = tmp_path / "small"
    shutil.copytree(ckpt, small)
    model = json.loads((small / "model.json").read_text())
    model["config"]["language_config"]["vocab_size"] = 525
    (small / "model.json").write_text(json.dumps(model))
    seal(small)
    message = refused(*flags, ckpt=small)
    assert "the tokenizer has 531 tokens (largest id 530), but the model's vocab_size is 525" in (
        message
    )


def png_header(width, height):
    """A PNG whose header has a size, without pixels."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    chunk = b"IHDR" + size + bytes([8, 2, 0, 0, 0])
    end = b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big")
        for c in (chunk, b"IDAT" + zlib.compress(b""), end)
    )


def test_wrong_images(refused, picture, tmp_path):
    def look(path, prompt="what is it?"):
        return refused("--image", path, "--prompt", prompt)

    text, cut, bomb = tmp_path / "text.png", tmp_path / "cut.jpg", tmp_path / "bomb.png"
    text.write_text("I am no picture")
    jpeg = io.BytesIO()
    with PIL.Image.open(picture) as opened:
        opened.convert("RGB").save(jpeg, "JPEG")
    cut.write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    bomb.write_bytes(png_header(20_000, 10_000))
    assert f"{text}: not a picture" in look(text)
    assert f"{cut}: damaged or truncated picture" in look(cut)
    assert f"{bomb}: " in look(bomb) and "pixels" in look(bomb)
    assert "cannot open the picture" in look(tmp_path / "absent.png")
    assert "2 <image> placeholders but 1 images" in look(picture, "<image> or <image>?")
    message = refused("--image", picture, "--prompt", "a", "--json", "--draw_on", 2)
    assert "--draw_on 2: the conversation has 1 images" in message


def test_wrong_messages(refused, picture, tmp_path):
    def read(content):
        file = tmp_path / "talk.json"
        file.write_text(content)
        return refused("--messages", file)

    assert "not valid JSON" in read("[")
    assert "not valid JSON" in read("[" * 100_000)
    assert "expected a list of rows" in read("3")
    assert "message 1: unknown role 'robot'" in read('[{"role": "robot", "content": "hi"}]')
    assert "image 1: expected a path" in read('{"prompt": "a", "images": [1]}')
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"prompt": "a", "images": [str(picture)]}))
    assert "give them only once" in refused("--messages", own, "--image", picture)


def test_messages_in_the_formats_of_training_data(ask, picture, tmp_path):
    """A conversation is read as a row is, and an answer at its end is continued."""
    row = {
        "conversations": [{"from": "human", "value": QUESTION}],
        "image": str(picture),
        "mood": "calm",
    }
    (tmp_path / "talk.json").write_text(json.dumps([row], indent=1), encoding="utf-16")
    flags = ["--messages", tmp_path / "talk.json", "--max_new_tokens", 24, "--json"]
    code, out, err = ask(*flags)
    assert code == 0 and json.loads(out)["tokens"] == GOLDEN
    assert err.count("['mood'] of rows are not read") == 1
    row["conversations"].append({"from": "gpt", "value": "It is"})
    (tmp_path / "talk.json").write_text(json.dumps(row))
    _, longer, _ = ask(*flags)
    assert json.loads(longer)["prompt_tokens"] > json.loads(out)["prompt_tokens"]
    (tmp_path / "talk.json").write_text(json.dumps([row, row]))
    code, out, err = ask(*flags)
    assert (code, out) == (1, "") and "talk.json has 2 rows; expected one conversation" in err


def test_a_prompt_that_is_too_long(refused, ckpt):
    message = refused("--prompt", "word " * 5000)
    assert "more than max_position_embeddings 4096" in message
    question = [{"role": "user", "content": "<|grounding|>"}]
    others = len(Session(ckpt).prepare(Request(question))) - 1
    message = refused("--prompt", "<|grounding|>" * (4096 - others))
    assert "4096 tokens, which leaves no room for an answer" in message


def test_an_empty_batch(refused, tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n")
    flags = ["--batch", tmp_path / "in.jsonl"]
    assert "no rows" in refused(*flags, "--out", tmp_path / "out.jsonl")
    assert "is the input" in refused(*flags, "--out", tmp_path / "in.jsonl")


def test_a_closed_pipe_ends_quietly(ckpt):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--prompt", "hi"]
    flags = ["--max_new_tokens", "4", "--compilation_cache", ROOT / ".cache" / "jax"]
    run = subprocess.run([*command, *flags], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert run.returncode == 0
    assert "Traceback" not in run.stderr and "rror" not in run.stderr


def test_a_plan_loads_nothing(ask, monkeypatch, tmp_path):
    monkeypatch.setattr(Session, "load", lambda self: pytest.fail("it was loaded"))
    (tmp_path / "in.jsonl").write_text("{}")
    code, out, err = ask("--plan")
    # 3 layers, a latent of 24 and a key of 8 in float32: 384 bytes per token.
    assert (code, out) == (0, "") and "1.86 MB on cpu" in err and "cache 384 B a token" in err
    assert "1 row of 4096 tokens: cache 1.57 MB, with the parameters 3.44 MB" in err
    flags = ["--batch", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--batch_size", 3]
    assert "3 rows of 4096 tokens: cache 4.72 MB" in ask(*flags, "--plan")[2]


def test_verbose_shows_what_is_compiled(ckpt):
    command = [sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--prompt", "hi", "--verbose"]
    flags = ["--max_new_tokens", "4", "--compilation_cache", ROOT / ".cache" / "jax"]
    run = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert run.returncode == 0
    told = [line for line in run.stderr.splitlines() if line.startswith("compile: ")]
    for name in ("embed", "prefill", "begin", "burst"):
        assert any(f"jit({name})" in line and "XLA compilation" in line for line in told), name
    chosen = [line for line in run.stderr.splitlines() if line.startswith("ops: ")]
    for name in ("attention", "experts", "cache_write"):
        assert any(line.startswith(f"ops: {name} of ") for line in chosen), name


def test_the_demonstration_model_answers_about_the_example(ask, tmp_path):
    (tmp_path / "original").mkdir()
    random_hf.write_checkpoint(tmp_path / "original")
    to_jax.convert(tmp_path / "original", tmp_path / "model", check=True)
    flags = ["--image", ROOT / "examples" / "shapes.png", "--prompt", "Which shapes do you see?"]
    code, out, err = ask(*flags, "--max_new_tokens", 4, "--json", ckpt=tmp_path / "model")
    assert code == 0 and "bfloat16" in err
    answer = json.loads(out)
    assert len(answer["tokens"]) == 4
    # 3 x 3 tokens per tile; 4 x 2 tiles are the best fit for 480 x 240 pixels.
    assert answer["image_tokens"] == 3 * (3 + 1) + 1 + 2 * 3 * (4 * 3 + 1)


def test_control_characters_do_not_reach_a_terminal(ask, scripted, monkeypatch):
    scripted("a\tb\x1b[2J\x9b\x7f")
    assert ask("--prompt", "hi")[1] == "a\tb\x1b[2J\x9b\x7f\n"
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    assert ask("--prompt", "hi")[1] == "a\tb\u241b[2J\ufffd\u2421\n"


def test_records_without_images_have_no_boxes():
    class Prepared:
        image_sizes, image_tokens = (), ()

    generation = Generation([1], "stop", BOX, 3, 0.1, 0.0)
    found = answer_output.record(generation, Prepared())
    assert (found["boxes"], found["image_tokens"]) == ([], 0)
