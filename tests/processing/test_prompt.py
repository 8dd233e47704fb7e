"""Tests of chat formats: the pieces of a conversation, and errors in malformed ones."""

import json

import pytest

from vl2jax.common.errors import UserError
from vl2jax.processing.prompt import (
    Piece,
    conversation_pieces,
    prompt_pieces,
    read_conversation,
    render_conversation,
    render_prompt,
)


def pieces(conversation, *, sft_format="deepseek", mask_prompt=True):
    messages, _ = read_conversation(conversation, sft_format=sft_format)
    return conversation_pieces(messages, sft_format=sft_format, mask_prompt=mask_prompt)


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content):
    return {"role": "assistant", "content": content}


def test_one_turn():
    conversation = [user(" <image>\nWhat? \n"), assistant(" A cat. ")]
    assert pieces(conversation) == [
        Piece("bos", True),
        Piece("text", False, "<|User|>: "),
        Piece("image", False),
        Piece("text", False, "\nWhat?\n\n<|Assistant|>:"),
        Piece("answer", True, "A cat."),
        Piece("eos", True),
    ]


def test_mask_prompt_false_supervises_questions_but_no_images():
    found = pieces([user("a<image>"), assistant("")], mask_prompt=False)
    assert [(piece.kind, piece.supervised) for piece in found] == [
        ("bos", True),
        ("text", True),
        ("image", False),
        ("text", True),
        ("answer", True),
        ("eos", True),
    ]


def test_several_turns_and_a_system_message():
    conversation = [
        {"role": "system", "content": " Be brief. "},
        {"role": "<|User|>", "content": "a"},
        {"role": "<|Assistant|>", "content": "b"},
        {"role": "<|User|>", "content": ""},
    ]
    assert pieces(conversation) == [
        Piece("bos", True),
        Piece("text", False, "Be brief."),
        Piece("text", False, "<|User|>: a\n\n<|Assistant|>:"),
        Piece("answer", True, "b"),
        Piece("eos", True),
        Piece("text", False, "<|User|>:<|Assistant|>:"),
    ]


def test_plain_and_alignment():
    conversation = [user("see <image> it"), assistant("b")]
    answer = [Piece("answer", True, "b"), Piece("eos", True)]
    assert pieces(conversation, sft_format="plain") == [
        Piece("bos", True),
        Piece("text", False, "see "),
        Piece("image", False),
        Piece("text", False, " it"),
        *answer,
    ]
    assert pieces(conversation, sft_format="alignment") == [
        Piece("bos", True),
        Piece("image", False),
        Piece("text", False, "\n"),
        *answer,
    ]


def test_a_prompt_is_supervised_as_a_whole():
    assert prompt_pieces("a<image>b") == [
        Piece("bos", True),
        Piece("text", True, "a"),
        Piece("image", False),
        Piece("text", True, "b"),
        Piece("eos", True),
    ]


def test_templates(data_dir):
    stored = json.loads((data_dir / "processor" / "chats-mini.json").read_text())["templates"]
    seen = 0
    for key, expected in stored["outputs"].items():
        sft_format, system_prompt = key.split("|", 1)
        if sft_format == "deepseekv2":
            with pytest.raises(UserError, match="'deepseekv2' is not supported"):
                render_prompt(stored["prompt"], sft_format=sft_format)
            continue
        options = {"sft_format": sft_format, "system_prompt": system_prompt}
        # The original displays any role name; ours validates the conversation first.
        messages, _ = read_conversation(stored["messages"])
        assert render_conversation(messages, **options) == expected["format_messages"], key
        assert render_prompt(stored["prompt"], **options) == expected["format_prompts"], key
        seen += 1
    assert seen == 6


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (["IMAGE", "What?"], "<image>\nWhat?"),
        (["What?", "IMAGE"], "What?\n<image>"),
        (["IMAGE", "IMAGE", "Which?"], "<image>\n<image>\nWhich?"),
        (["This is image 1: ", "IMAGE", "\nThis is 2: ", "IMAGE"], None),
        (["one", "two"], "one\ntwo"),
        (["", "IMAGE"], "<image>"),
    ],
)
def test_content_parts(parts, text):
    content = [
        {"type": "image_url", "image_url": {"url": "a.png"}}
        if part == "IMAGE"
        else {"type": "text", "text": part}
        for part in parts
    ]
    messages, sources = read_conversation([user(content)])
    assert messages[0].text == (text or "This is image 1: <image>\nThis is 2: <image>")
    assert sources == ["a.png"] * parts.count("IMAGE")


def test_sources_in_the_order_of_the_conversation():
    conversation = [
        user("<image><image>", images=["1.png", "2.png"]),
        assistant(None),
        user([{"type": "image", "image": "3.png"}, {"type": "image", "path": "4.png"}]),
        assistant("x"),
        user([{"type": "image_url", "image_url": "5.png"}, {"type": "image"}]),
    ]
    _, sources = read_conversation(conversation)
    assert sources == ["1.png", "2.png", "3.png", "4.png", "5.png", None]


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "conversation is empty"),
        ("hi", "must be a list of messages"),
        (user("hi"), "must be a list of messages"),
        ([{"content": "hi"}], "message 1: expected an object with 'role'"),
        (["hi"], "message 1: expected an object with 'role'"),
        ([{"role": "human", "content": "hi"}], r"unknown role 'human'; .*user, assistant, system"),
        ([user("a"), {"role": "tool", "content": "b"}], "message 2: unknown role 'tool'"),
        ([{"role": ["user"], "content": "b"}], "unknown role"),
        ([user("a"), {"role": "system", "content": "b"}], "message 2: a system message must be"),
        ([user("a"), assistant("<image>")], "message 2: <image> in the text of role 'assistant'"),
        ([{"role": "system", "content": "<image>"}], "images belong in user messages"),
        ([{"role": "assistant", "content": "a", "images": ["x"]}], "images belong in user"),
        ([user(3)], "'content' must be a text or a list of parts, got 3"),
        ([user(None)], "'content' must be a text"),
        ([user("a", images="x.png")], "'images' must be a list"),
        ([user([{"type": "audio"}])], "must be of type text, image or image_url"),
        ([user(["hi"])], "must be of type text, image or image_url"),
        ([user([{"type": "text"}])], "must be of type text, image or image_url"),
        ([user([{"type": "image_url"}])], "without a url"),
        ([user([{"type": "image"}], images=["x"])], "images come either as parts"),
    ],
)
def test_refusals(conversation, message):
    with pytest.raises(UserError, match=message):
        read_conversation(conversation)


@pytest.mark.parametrize("sft_format", ["plain", "alignment"])
def test_chat_tokens_are_roles_of_the_deepseek_format_only(sft_format):
    conversation = [{"role": "<|User|>", "content": "hi"}]
    with pytest.raises(UserError, match=r"unknown role '<\|User\|>'; format '" + sft_format):
        read_conversation(conversation, sft_format=sft_format)
