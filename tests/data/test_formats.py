"""Tests that every format gives the tokens of the same conversation, and of error messages."""

import base64
import io

import numpy as np
import PIL.Image
import pytest

from vl2jax.common.errors import UserError, shown
from vl2jax.data.formats import read_row
from vl2jax.data.row import Row
from vl2jax.data.samples import read_sample

WHERE = "rows.jsonl:17"
TURNS = [
    {"role": "user", "content": "<image>\nsee no 图片"},
    {"role": "assistant", "content": "a f(x)"},
]
PAIR = [
    {"role": "user", "content": "<image>\n<image>\nwhich"},
    {"role": "assistant", "content": "you"},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a wide, a square and a rotated image, and damaged files."""
    folder = tmp_path_factory.mktemp("pictures")
    wide = np.arange(60 * 120 * 3, dtype=np.uint32).reshape(60, 120, 3) % 251
    PIL.Image.fromarray(wide.astype(np.uint8)).save(folder / "wide.png")
    PIL.Image.new("RGB", (50, 50), (200, 10, 30)).save(folder / "square.png")
    turned = PIL.Image.Exif()
    turned[0x0112] = 6  # 40 wide and 80 high after the rotation
    PIL.Image.new("RGB", (80, 40)).save(folder / "turned.jpg", exif=turned)
    (folder / "empty.png").write_bytes(b"")
    (folder / "no_pixels.ppm").write_bytes(b"P6 0 0 255\n")
    whole = (folder / "wide.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture
def read(root):
    return lambda value: read_row(value, where=WHERE, root=root)


@pytest.fixture
def refused(read):
    """`refused(row)` returns the error message without its prefix, which must name the row."""

    def message(value):
        with pytest.raises(UserError) as error:
            read(value)
        text = str(error.value)
        assert text.startswith(f"{WHERE}: ")
        return text.removeprefix(f"{WHERE}: ")

    return message


@pytest.fixture
def assert_same(read, processor):
    """`assert_same(row, messages, images)` compares tokens, masks and tiles."""

    def check(value, messages, images):
        found = read_sample(read(value), processor, mask_prompt=True)
        expected = processor.sample(messages, images, inference=False, mask_prompt=True)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.image_index, expected.image_index)
        np.testing.assert_array_equal(found.loss_mask, expected.loss_mask)
        np.testing.assert_array_equal(found.tiles, expected.tiles)
        assert len(found.tokens) > 5

    return check


def llava(turns=TURNS, **more):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {
        "conversations": [{"from": names[t["role"]], "value": t["content"]} for t in turns]
    } | more


def test_llava(assert_same, root):
    assert_same(llava(id="0", image="wide.png"), TURNS, [root / "wide.png"])
    assert_same(
        llava(PAIR, image=["wide.png", "square.png"]),
        PAIR,
        [root / "wide.png", root / "square.png"],
    )
    text = [{"role": "user", "content": "no"}, TURNS[1], {"role": "user", "content": "a"}, PAIR[1]]
    assert_same(llava(text), text, [])
    assert_same(llava(text, image=None), text, [])


def test_images_without_placeholders_come_first(assert_same, root):
    bare = [{"role": "user", "content": "which"}, PAIR[1]]
    images = ["wide.png", "square.png"]
    assert_same(llava(bare, image=images), PAIR, [root / name for name in images])


def test_sharegpt(assert_same, root):
    images = {"images": ["square.png"]}
    assert_same({"messages": TURNS} | images, TURNS, [root / "square.png"])
    assert_same({"conversations": TURNS} | images, TURNS, [root / "square.png"])
    system = {"role": "system", "content": "see"}
    with_system = [system, *TURNS]
    assert_same({"messages": with_system} | images, with_system, [root / "square.png"])
    assert_same({"messages": TURNS, "system": "see"} | images, with_system, [root / "square.png"])
    assert_same(
        {"messages": TURNS, "system": "", "videos": []} | images, TURNS, [root / "square.png"]
    )


def test_conversations_of_the_original(assert_same, root):
    turns = [
        {"role": "<|User|>", "content": TURNS[0]["content"], "images": ["wide.png"]},
        {"role": "<|Assistant|>", "content": TURNS[1]["content"]},
    ]
    for row in (turns, {"conversation": turns}, {"messages": turns}):
        assert_same(row, TURNS, [root / "wide.png"])


def test_openai_parts(assert_same, root):
    data = "data:image/png;base64," + base64.b64encode((root / "wide.png").read_bytes()).decode()
    for url in ("wide.png", str(root / "wide.png"), f"file://{root}/wide.png", data):
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "see no 图片"},
        ]
        row = {"messages": [{"role": "user", "content": parts}, TURNS[1]]}
        assert_same(row, TURNS, [root / "wide.png"])


def test_order_of_images_is_that_of_the_parts(read, root):
    parts = [
        {"type": "image", "image": "square.png"},
        {"type": "text", "text": "then"},
        {"type": "image", "image": {"bytes": b"jpeg", "path": None}},
    ]
    row = read({"messages": [{"role": "user", "content": parts}, TURNS[1]]})
    assert row.messages[0] == {"role": "user", "content": "<image>\nthen\n<image>"}
    assert row.images == [str(root / "square.png"), b"jpeg"]


def test_parts_without_a_source_take_the_images_beside(assert_same, root):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "see no 图片"}]
    row = {"messages": [{"role": "user", "content": parts}, TURNS[1]], "images": ["wide.png"]}
    assert_same(row, TURNS, [root / "wide.png"])


def test_pictures_as_bytes(assert_same, root):
    content = (root / "wide.png").read_bytes()
    text = base64.b64encode(content).decode()
    for image in (
        content,
        {"bytes": content, "path": "gone.png"},
        {"bytes": text},
        {"bytes": None, "path": "wide.png"},
    ):
        assert_same({"messages": TURNS, "images": [image]}, TURNS, [content])
        assert_same(llava(image=image), TURNS, [content])


def test_documents(read, processor, root):
    row = read({"text": "see no"})
    assert row == Row(text="see no", images=[], where=WHERE)
    sample = read_sample(row, processor, mask_prompt=True)
    tokenizer = processor.tokenizer
    assert sample.tokens.tolist() == [
        tokenizer.bos_id,
        *tokenizer.encode("see no"),
        tokenizer.eos_id,
    ]
    assert sample.loss_mask.all()
    assert read({"messages": [{"role": "assistant", "content": "see no"}]}) == row
    mixed = read({"text": "no <image> see", "image": "wide.png"})
    assert (mixed.text, mixed.images) == ("no <image> see", [str(root / "wide.png")])
    sample = read_sample(mixed, processor)
    assert sample.image_tiles == ((3, 2),)
    assert read({"text": "see", "image": "wide.png"}).text == "<image>\nsee"
    turn = {"role": "assistant", "content": "<image>这是<image>"}
    pair = read({"messages": [turn], "images": ["wide.png", "square.png"]})
    assert (pair.text, len(pair.images)) == ("<image>这是<image>", 2)


def grounded(text, objects, image="wide.png"):
    turns = [{"role": "user", "content": "<image>where"}, {"role": "assistant", "content": text}]
    images = image if isinstance(image, list) else [image]
    return {"messages": turns, "images": images, "objects": objects}


def test_objects(read, assert_same, root):
    row = {
        "messages": [
            {"role": "user", "content": "<image>find <ref-object>"},
            {"role": "assistant", "content": "<ref-object><bbox><bbox> and <ref-object><bbox>."},
        ],
        "images": ["wide.png"],
        "objects": {
            "ref": ["图片", "图片", "you"],
            "bbox": [[0, 0, 120, 60], [30, 15, 60.5, 30], [1, 2, 3, 4]],
        },
    }
    expected = [
        {"role": "user", "content": "<image>find <|ref|>图片<|/ref|>"},
        {
            "role": "assistant",
            "content": "<|ref|>图片<|/ref|><|det|>[[0, 0, 999, 999], [250, 250, 504, 500]]<|/det|>"
            " and <|ref|>you<|/ref|><|det|>[[8, 33, 25, 67]]<|/det|>.",
        },
    ]
    assert read(row).messages == expected
    assert_same(row, expected, [root / "wide.png"])


def test_boxes_of_other_types_and_pictures(read):
    def answer(objects, image="wide.png"):
        return read(grounded("<bbox>", objects, image)).messages[-1]["content"]

    box = [[100, 0, 500, 1000]]
    assert answer({"bbox": box, "bbox_type": "norm1000"}) == "<|det|>[[100, 0, 500, 999]]<|/det|>"
    box = [[0.1, 0, 0.5, 1]]
    assert answer({"bbox": box, "bbox_type": "norm1"}) == "<|det|>[[100, 0, 500, 999]]<|/det|>"
    turned = {"bbox": [[10, 20, 40, 80]]}
    assert answer(turned, "turned.jpg") == "<|det|>[[250, 250, 999, 999]]<|/det|>"
    row = grounded("<bbox><bbox>", {"bbox": [[0, 0, 25, 50]] * 2, "image_id": [0, 1]})
    row["images"].append("square.png")
    row["messages"][0]["content"] = "<image><image>"
    assert read(row).messages[1]["content"] == "<|det|>[[0, 0, 208, 832], [0, 0, 500, 999]]<|/det|>"


def test_missing_image(refused, root):
    text = refused(llava(image="gone.png"))
    assert text.startswith(f"image 1: {root}/gone.png: cannot open the picture (No such file")
    assert "images_root" in text
    assert "Null" in refused(llava(image="a\0b")).title()
    assert "not a file" in refused(llava(image=str(root)))


def test_counts_that_differ(refused):
    assert "1 <image> in the text but 2 images" in refused(llava(image=["wide.png", "square.png"]))
    assert "1 <image> in the text but 0 images" in refused(llava())
    assert "2 <image> in the text but 1 images" in refused(llava(PAIR, image="wide.png"))
    own = [{"role": "user", "content": "see", "images": ["wide.png"]}, TURNS[1]]
    assert "0 <image> in the text but 1 images" in refused(own)
    assert "0 <image>" not in refused({"messages": own, "images": ["wide.png"]})


def test_images_in_two_places(refused):
    own = [{**TURNS[0], "images": ["wide.png"]}, TURNS[1]]
    assert "give them in one place" in refused({"messages": own, "images": ["wide.png"]})
    both = {"messages": TURNS, "image": "wide.png", "images": ["wide.png"]}
    assert "'image' and 'images' are both given" in refused(both)
    parts = [{"role": "user", "content": [{"type": "image"}]}, TURNS[1]]
    assert "has no source" in refused({"messages": parts})


def test_unknown_role(refused):
    text = refused({"conversations": [{"from": "robot", "value": "see"}]})
    assert text.startswith("message 1: unknown role 'robot'; expected one of user, human, <|User|>")
    assert "unknown role ['user']" in refused([{"role": ["user"], "content": "a"}])


def test_empty_answer(refused):
    for answer in ("", " \n"):
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "gpt", "content": answer}]}
        assert refused(row) == "message 2: empty answer; write it or leave the row out"
    assert "message 1: empty answer" in refused([{"role": "assistant", "content": " "}])
    assert "'text' must be a text that is not empty" in refused({"text": " "})
    assert "message 1: empty question" in refused([{"role": "user", "content": ""}, TURNS[1]])


def test_turns_that_do_not_alternate(refused):
    user, answer = {"role": "user", "content": "a"}, TURNS[1]
    system = {"role": "system", "content": "a"}
    assert "no turn of the assistant" in refused([user])
    assert "no turn of the assistant" in refused([system])
    assert "message 3: the conversation ends with role 'user'" in refused([user, answer, user])
    assert "message 2: role 'user' where 'assistant' is due" in refused([user, user, answer])
    assert "message 1: role 'assistant' where 'user' is due" in refused([answer, user, answer])
    assert "message 2: role 'assistant' where 'user' is due" in refused([system, answer])
    assert "a system message must be the first" in refused([user, answer, system])
    assert "give it once" in refused({"messages": [system, user, answer], "system": "b"})


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 121, 60],
        [0, 0, 120, 61],
        [-1, 0, 5, 5],
        [5, 0, 5, 5],
        [6, 0, 5, 5],
        [0, 5, 5, 4],
        [0, 0, 5, 10**400],
    ],
)
def test_box_outside_the_picture(refused, box):
    text = refused(grounded("<bbox>", {"bbox": [box]}))
    assert text.startswith(f"box 1 {shown(box)} is empty or outside image 1 (120 x 60)")
    assert "expected 0 <= x1 < x2 <= 120 and 0 <= y1 < y2 <= 60" in text


@pytest.mark.parametrize(
    "box", [[0, 0, float("nan"), 5], [0, 0, float("inf"), 5], [0, 0, True, 5], [1, 2, 3], "abcd", 7]
)
def test_box_that_is_none(refused, box):
    assert "box 1 must be four finite numbers" in refused(grounded("<bbox>", {"bbox": [box]}))


def test_objects_that_do_not_fit(refused):
    box = {"bbox": [[0, 0, 5, 5]]}
    assert "2 <bbox> in the text but 1 entries" in refused(grounded("<bbox><bbox>", box))
    assert "1 <bbox> in the text but 0 entries" in refused(grounded("<bbox>", None))
    assert "1 <ref-object> in the text but 0" in refused(grounded("<ref-object><bbox>", box))
    assert "bbox_type 'cm'" in refused(grounded("<bbox>", box | {"bbox_type": "cm"}))
    assert "box 1 is in picture 1 (from 0)" in refused(grounded("<bbox>", box | {"image_id": [1]}))
    assert "2 entries in objects['image_id']" in refused(
        grounded("<bbox>", box | {"image_id": [0, 0]})
    )
    assert "must hold names, got 7" in refused(grounded("<ref-object>", {"ref": [7]}))
    assert "objects['ref'] must be a list" in refused(grounded("<ref-object>", {"ref": "a"}))
    assert "'objects' must be like" in refused(grounded("a", [1]))
    assert "not a picture" in refused(grounded("<bbox>", box, "no_pixels.ppm"))


def test_absent_key(refused):
    assert "got the keys ['id', 'image']" in refused({"id": 1, "image": "wide.png"})
    assert "message 2: expected one of 'content' and 'value'; got the keys ['role']" in refused(
        [TURNS[0], {"role": "assistant", "content": None}]
    )
    assert "message 1: expected one of 'role' and 'from'" in refused([{"content": "a"}])
    assert "['messages', 'text'] together" in refused({"messages": TURNS, "text": "a"})
    assert "got the keys ['name']" in refused(llava(image={"name": "wide.png"}))


def test_other_things(refused):
    assert "got str" in refused("see")
    assert "must be a list of turns, got dict" in refused({"messages": {"role": "user"}})
    assert "message 1: expected a turn" in refused(["see"])
    assert "the conversation is empty" in refused([])
    assert "'videos' are not read" in refused({"messages": TURNS, "videos": ["a.mp4"]})
    assert "image 1: expected a path" in refused(llava(image=7))
    assert "image 1: no bytes" in refused(llava(image={"bytes": b""}))
    assert "not valid base64" in refused(llava(image={"bytes": "?"}))
    deep = []
    for _ in range(5000):
        deep = [deep]
    assert refused({"messages": deep}).startswith("nested too deeply")


def test_zero_size_image(refused, read, processor):
    assert "empty.png: the picture is empty (0 bytes)" in refused(llava(image="empty.png"))
    with pytest.raises(UserError, match=r"^rows.jsonl:17: .*no_pixels.ppm: not a picture"):
        read_sample(read(llava(image="no_pixels.ppm")), processor)


def test_what_only_reading_the_sample_shows(read, processor):
    with pytest.raises(UserError, match=r"^rows.jsonl:17: .*cut.png: damaged or truncated"):
        read_sample(read(llava(image="cut.png")), processor)
    with pytest.raises(
        UserError, match=r"^rows.jsonl:17: image 1: https://a/b.png: pictures are not fetch"
    ):
        read_sample(read(llava(image="https://a/b.png")), processor)
    long = [TURNS[0] | {"content": "no " * 5000}, TURNS[1]]
    with pytest.raises(UserError, match=r"^rows.jsonl:17: .* tokens, more than .* 4096"):
        read_sample(read(long), processor)
    with pytest.raises(UserError, match=r"^rows.jsonl:17: .* 4096"):
        read_sample(read({"text": "no " * 5000}), processor)
    with pytest.raises(UserError, match=r"^rows.jsonl:17: a text is not valid Unicode"):
        read_sample(read({"text": "a\ud800"}), processor)


def test_a_picture_in_memory_is_a_source_too(read, processor):
    file = io.BytesIO()
    image = PIL.Image.new("RGB", (60, 60), (9, 9, 9))
    image.save(file, "PNG")
    direct = read_sample(read(llava(image=image)), processor)
    encoded = read_sample(read(llava(image=file.getvalue())), processor)
    np.testing.assert_array_equal(direct.tiles, encoded.tiles)
