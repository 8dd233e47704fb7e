"""Rows as other tools write them mean what they say, or are refused by name."""

import base64

import numpy as np
import PIL.Image
import pytest

from vl2jax.common.errors import UserError
from vl2jax.data.formats import read_question, read_row
from vl2jax.data.samples import read_sample


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    PIL.Image.new("RGB", (120, 60), (200, 10, 30)).save(folder / "a.png")
    PIL.Image.new("RGB", (50, 50)).save(folder / "b.png")
    return folder


@pytest.fixture
def read(root):
    return lambda value: read_row(value, where="rows:1", root=root)


@pytest.fixture
def refused(read):
    """`refused(row)` returns the error message, which must be short and on one line."""

    def message(value):
        with pytest.raises(UserError) as error:
            read(value)
        text = str(error.value)
        assert text.startswith("rows:1: ") and len(text) < 800 and text.isprintable()
        return text.removeprefix("rows:1: ")

    return message


def talk(*texts, **more):
    """A row whose turns alternate; a tuple is a text with more keys."""
    turns = []
    for number, text in enumerate(texts):
        text, keys = text if isinstance(text, tuple) else (text, {})
        turns.append({"role": ("user", "assistant")[number % 2], "content": text} | keys)
    return {"messages": turns} | more


def supervised_text(row, processor, mask_prompt=True):
    sample = read_sample(row, processor, mask_prompt=mask_prompt)
    return processor.tokenizer.decode(sample.tokens[1:][sample.loss_mask[1:]])


EOS = "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    "off",
    [
        {"loss": False},
        {"loss": 0},
        {"loss_scale": 0.0},
        {"weight": 0},
        {"train": False},
        {"weight": 0, "loss": False, "loss_scale": None},
    ],
)
@pytest.mark.parametrize("keys", [("role", "content", "messages"), ("from", "value", None)])
def test_turns_without_a_loss_are_context(read, processor, off, keys):
    role, content, key = keys
    row = talk("ask", ("no see", off), "which", "you")
    turns = [{role: t["role"], content: t["content"], **t} for t in row["messages"]]
    turns = [{k: v for k, v in t.items() if k in (role, content, *off)} for t in turns]
    row = read({key or "conversations": turns})
    assert supervised_text(row, processor) == f"you{EOS}"
    whole = read(talk("ask", "no see", "which", "you"))
    assert supervised_text(whole, processor) == f"no see{EOS}you{EOS}"
    tokens = [read_sample(one, processor).tokens.tolist() for one in (row, whole)]
    assert tokens[0] == tokens[1]
    assert "no see" not in supervised_text(row, processor, mask_prompt=False)


def test_turns_with_a_loss_are_supervised(read, processor):
    on = {"loss": True, "weight": 1, "loss_scale": 1.0}
    row = read(talk("which", ("you", on)))
    assert supervised_text(row, processor) == f"you{EOS}"
    asked = read(talk(("which", {"loss": True}), "you"))
    assert "which" in supervised_text(asked, processor)
    unasked = read(talk(("which", {"loss": False}), "you"))
    assert supervised_text(unasked, processor, mask_prompt=False) == f"you{EOS}"


def test_losses_that_mean_nothing(refused):
    off = {"loss": False}
    assert "message 2: 'weight' must be true, false, 1 or 0, got 0.5" in refused(
        talk("a", ("b", {"weight": 0.5}))
    )
    assert "got 'false'" in refused(talk("a", ("b", {"loss": "false"})))
    assert "contradict each other" in refused(talk("a", ("b", {"loss": True, "weight": 0})))
    assert "nothing to learn" in refused(talk("a", ("b", off)))
    assert "nothing to learn" in refused([{"role": "assistant", "content": "b"} | off])
    assert "'weight' of a whole row (0) is not read" in refused(talk("a", "b", weight=0))
    assert "'loss' of a whole row (False) is not read" in refused(talk("a", "b", loss=False))


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_a_system_message_beside_the_turns(read, refused, key):
    messages = read(talk("a", "b", **{key: "Short."})).messages
    assert messages[0] == {"role": "system", "content": "Short."} and len(messages) == 3
    assert len(read(talk("a", "b", **{key: ""})).messages) == 2
    assert "must be a text, got 7" in refused(talk("a", "b", **{key: 7}))
    turns = [{"role": "system", "content": "b"}, *talk("a", "b")["messages"]]
    assert "give it once" in refused({"messages": turns, key: "a"})


def test_empty_system_messages_are_none(read):
    for content in ({"content": None}, {"content": ""}, {}):
        row = {"messages": [{"role": "system"} | content, *talk("a", "b")["messages"]]}
        assert [message["role"] for message in read(row).messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({key: "A.mp4"}, key)
        for key in ("video", "audio", "video_path", "rejected", "chosen", "rejected_response")
    ]
    + [({key: ["A.mp4"]}, key) for key in ("videos", "audios", "rejected_messages")]
    + [({"kto_tag": True}, "kto_tag")],
)
def test_keys_that_are_refused_by_name(read, refused, more, name):
    assert f"'{name}' " in (text := refused(talk("a", "b", **more))) and "not read" in text
    for empty in (None, "", [], False):
        assert len(read(talk("a", "b", **{name: empty})).messages) == 2


def test_tools_in_turns_are_refused_by_name(refused):
    call = {"tool_calls": [{"function": {"name": "f"}}]}
    assert "message 2: 'tool_calls' are not read" in refused(talk("a", ("b", call)))
    assert "message 1: 'video' is not read" in refused(talk(("a", {"video": "a.mp4"}), "b"))


IMAGE_MARKS = [
    *("<image>", "<image_placeholder>", "<ImageHere>", "<|image|>", "<|image_pad|>"),
    *("<|vision_start|><|image_pad|><|vision_end|>", "<image_soft_token>", "<start_of_image>"),
    *("<img><IMG_CONTEXT><IMG_CONTEXT></img>", "<IMG_CONTEXT>", "<img></img>", "<|media_pad|>"),
    *("(<image>./</image>)", "<image></image>", "<image_1>", "<|image_1|>", "<image 1>"),
    *("<image1>", "<|image1|>", "<image_0>", "<IMAGE>", "<Image>", "<image/>", "<image />"),
    *("[IMG]", "[IMAGE]", "[image]"),
]


@pytest.mark.parametrize("mark", IMAGE_MARKS)
def test_placeholders_of_other_tools_are_places_of_images(read, mark):
    row = read(talk(f"What is in {mark} here?", "a box", images=["a.png"]))
    assert row.messages[0]["content"] == "What is in <image> here?"
    assert len(row.images) == 1


@pytest.mark.parametrize("marks", [("<image_1>", "<image_2>"), ("<|image_0|>", "<|image_1|>")])
def test_numbered_placeholders_are_in_order(read, refused, marks):
    one, two = marks
    row = read(talk(f"{one} or {two}?", "you", images=["a.png", "b.png"]))
    assert row.messages[0]["content"] == "<image> or <image>?"
    for text in (f"{two} or {one}?", f"{one} or {one}?"):
        assert "in order" in refused(talk(text, "you", images=["a.png", "b.png"]))


@pytest.mark.parametrize(
    "text",
    [
        "<video>What?",
        "What? <audio>",
        "<|video_pad|>",
        "<|audio|>x",
        "<video_placeholder>",
        "<AUDIO>",
        "<|vision_start|><|video_pad|><|vision_end|>x",
        "<video_1>",
        "<VideoHere>x",
        "<speech>",
    ],
)
def test_placeholders_of_videos_and_audio_are_refused(refused, text):
    for row in (talk(text, "b"), talk(text, "b", images=["a.png"])):
        assert "in the text: videos and audio are not read" in refused(row)


def test_paths_in_texts_are_refused(refused):
    text = refused(talk("Picture 1: <img>a.png</img>\nWhat?", "b"))
    assert "'<img>a.png</img>' in the text: paths in texts are not read" in text


@pytest.mark.parametrize(
    "text",
    [
        "<video src='a.mp4'>",
        "<video><source></video> plays?",
        "a < video > b",
        "[IMG]a[/IMG]",
        "<img src='a.png'>",
        "import <Image> from",
        "videos and images",
        "<images>",
    ],
)
def test_code_stays_text(read, text):
    assert read(talk(text, "b")).messages[0]["content"] == text
    assert read(talk("a", text)).messages[1]["content"] == text
    assert read(talk("a", "the <video> tag")).messages[1]["content"] == "the <video> tag"


def test_placeholders_need_images_and_belong_in_questions(refused):
    assert "1 <image> in the text but 0 images" in refused(talk("<image_placeholder>What?", "b"))
    text = refused(talk("a", "<image_placeholder>b", images=["a.png"]))
    assert "message 2: a placeholder of an image in the text of role 'assistant'" in text


@pytest.mark.parametrize(
    ("user", "assistant"),
    [
        ("user", "assistant"),
        ("human", "gpt"),
        ("Human", "GPT"),
        ("USER", "model"),
        ("User", "bot"),
        ("<|User|>", "<|Assistant|>"),
        ("<|user|>", "<|assistant|>"),
        ("user ", "chatgpt"),
    ],
)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("system", ["system", "System", "developer", None])
def test_roles_of_all_dialects(read, user, assistant, keys, system):
    role, content = keys
    turns = [{role: user, content: "a"}, {role: assistant, content: "b"}]
    if system:
        turns.insert(0, {role: system, content: "c"})
    found = read({"conversations": turns}).messages
    assert [m["role"] for m in found] == ["system"] * bool(system) + ["user", "assistant"]


@pytest.mark.parametrize("role", ["tool", "function", "observation", "", None, 7, ["user"]])
def test_other_roles_are_refused(refused, role):
    assert "message 1: " in refused({"messages": [{"role": role, "content": "a"}]})


def picture_forms(root):
    content = (root / "a.png").read_bytes()
    text = base64.b64encode(content).decode()
    url = f"data:image/png;base64,{text}"
    return [
        "a.png",
        f" {root}/a.png",
        f"file://{root}/a.png",
        url,
        f"DATA:image/png;charset=utf-8;base64,{base64.encodebytes(content).decode()}",
        content,
        {"bytes": content, "path": None},
        {"bytes": text},
        {"bytes": base64.urlsafe_b64encode(content).decode().rstrip("=")},
        {"bytes": list(content), "path": "gone.png"},
        {"bytes": url},
        {"bytes": None, "path": "a.png"},
        {"bytes": "", "path": "a.png"},
        {"path": "a.png"},
        {"path": "", "url": url},
        {"url": f"file://{root}/a.png"},
        {"image_url": {"url": url}},
        {"base64": text},
        {"type": "base64", "media_type": "image/png", "data": text},
        {"type": "image", "source": {"type": "base64", "data": text}},
    ]


def test_all_forms_of_images(read, root, processor):
    want = read_sample(read(talk("<image>a", "b", images=["a.png"])), processor)
    for form in picture_forms(root):
        rows = [talk("<image>a", "b", **{key: form}) for key in ("image", "images")]
        rows += [talk("a", "b", images=[None, form, {"bytes": None}, ""])]
        rows += [talk(("<image>a", {"images": [form]}), "b")]
        rows += [talk([{"type": "image", "image": form}, {"type": "text", "text": "a"}], "b")]
        for row in rows:
            found = read_sample(read(row), processor)
            np.testing.assert_array_equal(found.tiles, want.tiles)
            assert found.image_sizes == ((120, 60),)


@pytest.mark.parametrize("image", [None, "", [], {}, [None], [""], {"bytes": None, "path": None}])
def test_rows_that_say_that_they_have_no_image(read, refused, image):
    for key in ("image", "images"):
        assert not read(talk("a", "b", **{key: image})).images
        assert "1 <image> in the text but 0 images" in refused(talk("<image>", "b", **{key: image}))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.com/a.png", "https://example.com/a.png: pictures are not fetched"),
        ({"url": "HTTP://a/b"}, "pictures are not fetched"),
        ({"image_url": {"url": "https://a/b"}}, "pictures are not fetched"),
        ({"bytes": [1, 999]}, "must be bytes or a base64 text"),
        ({"bytes": 7}, "must be bytes or a base64 text, got 7"),
        ({"name": "a.png"}, "got the keys ['name']"),
        ({f"k{n}": n for n in range(999)}, "(991 more)"),
        (7, "expected a path"),
        ([["a.png"]], "expected a path"),
        ("x" * 10**6, "(1000"),
        ("/9j/" + "A" * 10**6, "looks like base64"),
        ("QUJD" * 10**5, "looks like base64"),
        ({"bytes": "*" * 10**6}, "not valid base64"),
        (b"", "no bytes"),
    ],
)
def test_images_that_are_refused(refused, image, message):
    text = refused(talk("<image>a", "b", images=[image]))
    assert text.startswith("image 1: ") and message in text


def test_parts_of_other_dialects(read, refused):
    expected = [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "b"},
    ]
    for parts in (
        [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?", "image": None}],
        [{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "What?"}],
        [{"image": "a.png"}, {"text": "What?"}],
        [{"type": "image_url", "image_url": "a.png"}, "What?"],
    ):
        row = read(talk(parts, [{"type": "text", "text": "b"}]))
        assert row.messages == expected and len(row.images) == 1
    assert "a part of type 'video_url' is not read" in refused(talk([{"type": "video_url"}], "b"))
    assert "a part of type 'input_audio'" in refused(talk([{"type": "input_audio"}], "b"))
    assert "a part of 'content'" in refused(talk([{"type": "file", "data": "A" * 10**6}], "b"))
    assert "a part of 'content'" in refused(talk([7], "b"))


def test_questions_and_answers_of_the_cauldron(read, refused):
    pairs = [
        {"user": "What?", "assistant": "a box", "source": "x"},
        {"user": "c", "assistant": "d"},
    ]
    row = read({"texts": pairs, "images": [{"path": "a.png"}]})
    assert [message["content"] for message in row.messages] == ["<image>\nWhat?", "a box", "c", "d"]
    assert not row.unread
    assert "'texts' must be a list of {'user'" in refused({"texts": [None, "a"]})


def test_prompts(refused, root):
    assert "no turn of the assistant" in refused({"prompt": "a", "messages": None})
    asked = read_question({"prompt": "a", "image": ""}, where="x", folders=[root])
    assert asked.messages == [{"role": "user", "content": "a"}]
    asked = read_question({"prompt": "a", "images": ["a.png"]}, where="x", folders=[root])
    assert asked.messages[0]["content"] == "<image>\na"


def test_keys_that_are_not_read_are_known(read):
    row = read(talk(("a", {"name": "x", "id": 3}), "b", id=7, category="c", tools=[1], note=None))
    assert row.unread == ("category", "messages[].name", "tools")
    assert read(talk("a", ("b", {"weight": 1}), id=7, question_id=3, objects=None)).unread == ()
    assert read(talk("a", "b", objects={"ref": [], "width": [3]})).unread == ("objects.width",)


def grounded(box, **objects):
    return talk("<image>Find", "<bbox>", images=["a.png"], objects={"bbox": [box], **objects})


@pytest.mark.parametrize("kind", ["real", ["real"], "norm1000", ["norm1000"]])
@pytest.mark.parametrize(
    "box", [[0.1, 0.2, 0.5, 0.7], [0, 0, 1, 1], [0.0, 0.0, 1.0, 0.5], [30.1, 20.2, 30.8, 20.9]]
)
def test_boxes_under_one_unit_are_refused(refused, kind, box):
    text = refused(grounded(box, bbox_type=kind))
    assert "box 1 " in text and "normalised? then give 'bbox_type': 'norm1'" in text


def test_small_boxes(read):
    for box in ([3, 3, 4, 4], [0, 0, 0.5, 60], [3.5, 3.5, 4.2, 6]):
        assert "<|det|>" in read(grounded(box)).messages[1]["content"]
    assert read(grounded([0, 0, 1, 0.5], bbox_type="norm1")).messages[1]["content"] == (
        "<|det|>[[0, 0, 999, 500]]<|/det|>"
    )


def test_types_of_boxes_as_a_list(read, refused):
    two = talk("<image>Find", "<bbox><bbox>", images=["a.png"])
    boxes = {"ref": [], "bbox": [[30, 15, 60, 30], [250, 250, 500, 500]]}
    row = two | {"objects": boxes | {"bbox_type": ["real", "norm1000"], "image_id": [0, 0]}}
    box = "[250, 250, 500, 500]"
    assert read(row).messages[1]["content"] == f"<|det|>[{box}, {box}]<|/det|>"
    assert "3 entries in objects['bbox_type'] but 2 boxes" in refused(
        two | {"objects": boxes | {"bbox_type": ["real"] * 3}}
    )
    assert "bbox_type 'cm'" in refused(two | {"objects": boxes | {"bbox_type": ["cm"]}})


@pytest.mark.parametrize(
    "row",
    [
        {f"key {n}": "x" * 10**5 for n in range(10**4)},
        {"messages": "x" * 10**6},
        {"messages": ["x" * 10**6]},
        talk("a", "b", system={"x" * 10**5: 1}),
        talk("a", ("b", {"weight": "x" * 10**6})),
        {"messages": [{"role": "x" * 10**6, "content": "a"}]},
        {"messages": [{"x" * 10**6: 1}]},
        talk("<image_2>" * 10**4, "b", images=["a.png"]),
        talk(
            "<bbox>" * 10**4, "b", objects={"bbox": ["x" * 10**5] * 10**4, "image_id": [0] * 10**4}
        ),
        talk("<bbox>", "b", objects={"bbox": [list(range(10**6))]}, images=["a.png"]),
        talk("a", "b", objects="x" * 10**6),
        {"text": ["x" * 10**6]},
        {"texts": ["x" * 10**6] * 100},
        {"prompt": {"x" * 10**6: 1}},
        "x" * 10**6,
        ["x" * 10**6] * 100,
    ],
)
def test_messages_are_short(refused, row):
    assert refused(row)
