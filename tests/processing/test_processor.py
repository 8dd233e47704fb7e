"""Tests of tokenizer and processor: ids, masks, tiles and batches equal the original's."""

import dataclasses
import hashlib
import json
import random
import shutil

import numpy as np
import PIL.Image
import pytest

from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.config import architecture as config_lib
from vl2jax.config.processor import ProcessorConfig
from vl2jax.processing.batch import TEXT
from vl2jax.processing.processor import Processor
from vl2jax.processing.tokenizer import StreamDecoder, Tokenizer

OTHER_ENTRIES = ("prompt_", "conv_system_arg")
NOT_CHATS = ("batch|", "special_ids", "tokenizer_len", "templates", "tokenize", "plain_rejects")


@dataclasses.dataclass(frozen=True)
class Goldens:
    """A set of golden conversations, and the processor that must reproduce them."""

    cases: dict
    arrays: dict
    processor: Processor
    images: object

    def sample(self, key):
        case = self.cases[key]
        settings = dataclasses.replace(
            self.processor.settings,
            sft_format=case["sft_format_name"],
            mask_prompt=case["mask_prompt"],
        )
        processor = dataclasses.replace(self.processor, settings=settings)
        images = [self.images / name for name in case["images"]]
        options = {"inference": case["inference_mode"]}
        if "prompt" in case:
            return processor.sample_prompt(
                case["prompt"],
                images,
                apply_sft_format=case["apply_sft_format"],
                system_prompt=case.get("system_prompt", ""),
                **options,
            )
        conversation = case.get("conversation", case.get("conversations"))
        return processor.sample(conversation, images, **options)


@pytest.fixture(
    scope="module",
    params=[
        "carried",
        pytest.param("mini", marks=pytest.mark.reference),
        pytest.param("real", marks=pytest.mark.reference),
    ],
)
def goldens(request):
    """The golden conversations in this repository, and both full sets."""
    root = request.getfixturevalue("data_dir" if request.param == "carried" else "reference")
    name = "real" if request.param == "real" else "mini"
    folder = root / "processor"
    tokenizer = root / ("real_tokenizer" if name == "real" else "mini-small")
    data = request.getfixturevalue("data_dir") / "processor" / "processor_config.json"
    with np.load(folder / f"chats-{name}.npz") as arrays:
        return Goldens(
            cases=json.loads((folder / f"chats-{name}.json").read_text(encoding="utf-8")),
            arrays=dict(arrays),
            processor=Processor(
                tokenizer=Tokenizer.from_dir(tokenizer),
                settings=ProcessorConfig.from_dict(json.loads(data.read_text())),
                config=config_lib.tiny(),  # tiles of the released models
            ),
            images=folder / "images",
        )


@pytest.fixture
def mini_dir(data_dir, tmp_path):
    """A copy of a model directory without weights, which a test may damage."""
    folder = tmp_path / "mini"
    folder.mkdir()
    for source in (data_dir / "mini-small").glob("*.json"):
        shutil.copyfile(source, folder / source.name)
    return folder


@pytest.fixture(scope="module")
def mini_config(data_dir):
    return VL2Config.from_hf(json.loads((data_dir / "mini-small" / "config.json").read_text()))


@pytest.fixture
def picture():
    return PIL.Image.new("RGB", (110, 55), (200, 100, 50))


def user(content, **more):
    return {"role": "user", "content": content, **more}


def edit(path, **changes):
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | changes), encoding="utf-8")


def test_special_tokens(goldens):
    tokenizer = goldens.processor.tokenizer
    ids = goldens.cases["special_ids"]
    assert {token: tokenizer.token_to_id(token) for token in ids} == ids
    assert len(tokenizer) == goldens.cases["tokenizer_len"]
    four = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id)
    assert four == tuple(list(ids.values())[:4])


def test_tokenize(goldens):
    tokenizer = goldens.processor.tokenizer
    for case in goldens.cases["tokenize"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case
        assert tokenizer.decode(case["ids"]) == case["decode"], case
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip"], case


def test_chats(goldens):
    compared = refused = 0
    for key, case in goldens.cases.items():
        if key.startswith(NOT_CHATS):
            continue
        if "error" in case:
            with pytest.raises(UserError):
                goldens.sample(key)
            refused += 1
            continue
        sample, arrays = goldens.sample(key), goldens.arrays
        np.testing.assert_array_equal(sample.tokens, arrays[f"{key}/input_ids"], key)
        supervised = arrays[f"{key}/target_ids"] != -100
        np.testing.assert_array_equal(sample.loss_mask, supervised, key)
        visual = sample.image_index != TEXT
        np.testing.assert_array_equal(visual, arrays[f"{key}/images_seq_mask"], key)
        crop = arrays[f"{key}/images_spatial_crop"].tolist()
        assert [list(tiles) for tiles in sample.image_tiles] == [c for c in crop if c != [0, 0]]
        assert list(sample.image_tokens) == case["num_image_tokens"]
        hashes = [hashlib.sha256(t.transpose(2, 0, 1).tobytes()).hexdigest() for t in sample.tiles]
        assert hashes == (case.get("tiles_uint8_sha256") or []), key
        if not key.startswith(OTHER_ENTRIES):
            assert sample.display == case["sft_format"], key
        compared += 1
    assert (compared, refused) == (80, 8)


def test_roles_of_another_format(goldens):
    assert goldens.cases["plain_rejects_deepseek_roles"] == {"error": "AssertionError"}
    conversation = [{"role": "<|User|>", "content": "hi"}]
    with pytest.raises(UserError, match="unknown role"):
        goldens.processor.sample(conversation, [], sft_format="plain")


def test_batches(goldens):
    names = [key for key in goldens.cases if key.startswith("batch|")]
    assert len(names) == 16
    for key in names:
        case = goldens.cases[key]
        infer = int(case["inference_mode"])
        samples = [goldens.sample(f"{m}|deepseek|mask1|infer{infer}") for m in case["members"]]
        batch = goldens.processor.collate(samples)
        lengths = case["seq_lens"]
        assert batch.segment_ids.sum(axis=1).tolist() == lengths
        assert batch.tokens.shape == goldens.arrays[f"{key}/input_ids"].shape
        total = batch.tokens.shape[1]
        for row, length in enumerate(lengths):
            ours = np.s_[row, :length]
            stored = np.s_[row, total - length :] if case["padding"] == "left" else ours
            expected = {
                name: goldens.arrays[f"{key}/{name}"][stored]
                for name in ("input_ids", "labels", "images_seq_mask", "attention_mask")
            }
            np.testing.assert_array_equal(batch.tokens[ours], expected["input_ids"])
            np.testing.assert_array_equal(batch.loss_mask[ours], expected["labels"] != -100)
            np.testing.assert_array_equal(batch.image_index[ours] >= 0, expected["images_seq_mask"])
            assert expected["attention_mask"].all()
            rest = np.s_[row, length:]
            assert (batch.tokens[rest] == goldens.processor.tokenizer.pad_id).all()
            assert (batch.image_index[rest] == TEXT).all()
            assert not batch.loss_mask[rest].any() and not batch.segment_ids[rest].any()


@pytest.mark.parametrize("name", ["tiny", "small", "base", "extra"])
def test_inputs_of_the_mini_checkpoints(reference, name):
    folder = reference / f"mini-{name}"
    config = VL2Config.from_hf(json.loads((folder / "config.json").read_text()))
    processor = Processor.from_dir(folder, config)
    cases = json.loads((folder / "golden" / "golden.json").read_text(encoding="utf-8"))["cases"]
    for key, case in cases.items():
        samples = [
            processor.sample(
                sample["conversation"],
                [folder / "golden" / image for image in sample["images"]],
                inference=case["inference_mode"],
                mask_prompt=case["mask_prompt"],
            )
            for sample in case["samples"]
        ]
        batch = processor.collate(samples)
        with np.load(folder / "golden" / f"{key}.npz") as stored:
            inputs = {name: stored[name] for name in stored.files if name.startswith("in/")}
        theirs, ours = inputs["in/attention_mask"], batch.segment_ids == 1
        assert batch.tokens.shape == theirs.shape
        np.testing.assert_array_equal(batch.tokens[ours], inputs["in/input_ids"][theirs])
        supervised = inputs["in/labels"][theirs] != -100
        np.testing.assert_array_equal(batch.loss_mask[ours], supervised)
        for row, sample in enumerate(samples):
            views = inputs["in/images"][row, : len(sample.tiles)].transpose(0, 2, 3, 1)
            normalised = (sample.tiles.astype(np.float32) / 255 - 0.5) / 0.5
            np.testing.assert_array_equal(normalised, views)


def test_small_example_written_out(processor, picture):
    # 110 x 55 fits 112 x 56: two tiles side by side, 2 x 2 tokens each.
    batch = processor([user("a<image>b"), {"role": "assistant", "content": "c"}], [picture])
    image = processor.tokenizer.image_id
    index = batch.image_index[0]
    start = int(np.argmax(index >= 0))
    expected = [2, 3, 0, 4, 5, 0, 1, 6, 7, 10, 11, 0, 8, 9, 12, 13, 0]
    assert index[start : start + 17].tolist() == expected
    assert (index >= 0).sum() == 17
    assert (batch.tokens[0] == image).tolist() == (index >= 0).tolist()
    assert batch.tiles.shape == (3, 56, 56, 3) and batch.tiles.dtype == np.uint8
    assert batch.positions[0].tolist() == list(range(batch.tokens.shape[1]))
    assert batch.tokens.dtype == batch.image_index.dtype == batch.positions.dtype == np.int32
    assert batch.loss_mask.dtype == np.bool_


def test_rows_of_a_batch_share_a_pool(processor, picture):
    conversations = [[user("<image>a")], [user("no image")], [user("<image>\n<image>")]]
    batch = processor(conversations, [[picture], [], [picture, picture]])
    assert batch.tiles.shape[0] == 9 and batch.tokens.shape[0] == 3
    alone = processor(conversations[2], [picture, picture])
    index, count = batch.image_index[2], alone.tokens.shape[1]
    learned = alone.image_index[0] < 2
    np.testing.assert_array_equal(index[:count][learned], alone.image_index[0][learned])
    # The tiles of the third sample follow three tiles of four visual tokens.
    np.testing.assert_array_equal(index[:count][~learned], alone.image_index[0][~learned] + 12)
    np.testing.assert_array_equal(batch.tiles[3:], alone.tiles)
    assert (batch.image_index[1] == TEXT).all()


def test_text_only_has_no_tiles(processor):
    batch = processor([user("hi")])
    assert batch.tiles.shape == (0, 56, 56, 3)


def test_global_view_at_the_tail(processor, picture):
    tail = dataclasses.replace(processor.config, global_view_pos="tail")
    sample = dataclasses.replace(processor, config=tail).sample([user("<image>")], [picture])
    rows = sample.image_index[sample.image_index >= 0].tolist()
    assert rows == [6, 7, 10, 11, 0, 8, 9, 12, 13, 0, 1, 2, 3, 0, 4, 5, 0]


@pytest.mark.parametrize(
    ("count", "crop", "tiles"),
    [(2, None, (2, 1)), (3, None, (1, 1)), (3, True, (2, 1)), (1, False, (1, 1))],
)
def test_tiling_depends_on_the_number_of_images(processor, picture, count, crop, tiles):
    sample = processor.sample([user("<image>" * count)], [picture] * count, crop=crop)
    assert sample.image_tiles == (tiles,) * count
    assert sample.image_sizes == ((110, 55),) * count


def test_openai_messages_equal_the_originals(processor, data_dir):
    path = data_dir / "processor" / "images" / "gray_97x61.png"
    original = [
        {"role": "<|User|>", "content": "<image>\nWhat?", "images": [str(path)]},
        {"role": "<|Assistant|>", "content": ""},
    ]
    openai = [
        user(
            [
                {"type": "image_url", "image_url": {"url": path.resolve().as_uri()}},
                {"type": "text", "text": "What?"},
            ]
        )
    ]
    first, second = processor(original), processor(openai)
    for field in ("tokens", "image_index", "tiles", "segment_ids"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))


def test_given_images_replace_named_ones(processor, picture):
    conversation = [user("<image>", images=["not opened.png"])]
    assert processor.sample(conversation, [picture]).image_sizes == ((110, 55),)
    with pytest.raises(UserError, match=r"not opened\.png: cannot open"):
        processor.sample(conversation)
    parts = [user([{"type": "image"}])]
    assert processor.sample(parts, [picture]).image_sizes == ((110, 55),)
    with pytest.raises(UserError, match="no images are given for it"):
        processor.sample(parts)
    with pytest.raises(UserError, match="images are given twice"):
        processor.sample([user([{"type": "image", "image": "a.png"}])], [picture])


def test_exif_flag(processor, data_dir):
    path = data_dir / "processor" / "images" / "exif_rot6_400x200.jpg"
    assert processor.sample([user("<image>")], [path]).image_sizes == ((200, 400),)
    raw = processor.sample([user("<image>")], [path], exif=False)
    assert raw.image_sizes == ((400, 200),)


@pytest.mark.parametrize(("written", "given"), [(0, 1), (1, 0), (2, 1), (1, 3)])
def test_placeholders_and_images_must_agree(processor, picture, written, given):
    with pytest.raises(UserError, match=f"{written} <image> placeholders but {given} images"):
        processor.sample([user("x" + "<image>" * written)], [picture] * given)


def test_prompt_length(processor):
    question, answer = user("hi"), {"role": "assistant", "content": "yes"}
    open_ended = processor.sample([question])
    assert open_ended.prompt_length == len(open_ended)
    assert processor.sample([question, answer]).prompt_length == len(open_ended)
    trained = processor.sample([question, answer], inference=False, mask_prompt=True)
    assert trained.prompt_length == len(open_ended)
    # Targets: bos (never predicted), the answer and its eos.
    assert trained.loss_mask.tolist()[1:] == [
        place >= len(open_ended) for place in range(1, len(trained))
    ]


def test_too_long(processor, picture):
    decoder = dataclasses.replace(processor.config.decoder, max_position_embeddings=40)
    short = dataclasses.replace(
        processor, config=dataclasses.replace(processor.config, decoder=decoder)
    )
    text = processor.sample([user("<image>\n<image>")], [picture, picture])
    total = len(text)
    with pytest.raises(UserError) as caught:
        short.sample([user("<image>\n<image>")], [picture, picture])
    assert str(caught.value).startswith(
        f"the prompt has {total} tokens, more than max_position_embeddings 40: text {total - 34},"
        " image 1 17 (2 x 1 tiles), image 2 17 (2 x 1 tiles); without tiling an image takes 13"
    )


def test_collate_pads_to_a_given_length(processor, picture):
    sample = processor.sample([user("<image>")], [picture])
    batch = processor.collate([sample], length=64, tile_slots=5)
    assert batch.tokens.shape == (1, 64) and batch.tiles.shape[0] == 5
    assert not batch.tiles[3:].any()
    for options in ({"length": len(sample) - 1}, {"tile_slots": 2}):
        with pytest.raises(UserError, match="do not fit"):
            processor.collate([sample], **options)
    with pytest.raises(UserError, match="at least one sample"):
        processor.collate([])


def test_calls_that_make_no_sense(processor, picture):
    with pytest.raises(UserError, match="2 conversations and 1 lists of images"):
        processor([[user("a")], [user("b")]], [[]])
    with pytest.raises(UserError, match="put it into a list"):
        processor([user("<image>")], picture)
    with pytest.raises(UserError, match="conversation is empty"):
        processor([])
    with pytest.raises(UserError, match="'chatml' is not supported"):
        processor([user("a")], sft_format="chatml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidate_resolution": []}, "unknown field 'candidate_resolution'; did you mean"),
        ({"image_mean": [0.4, 0.5, 0.5]}, "image_mean .* is not supported"),
        ({"image_std": [0.5, 0.5]}, "image_std .* is not supported"),
        ({"normalize": False}, "normalize = False is not supported"),
        ({"sft_format": "deepseekv2"}, "'deepseekv2' is not supported"),
        ({"mask_prompt": "yes"}, "mask_prompt must be bool, got 'yes'"),
        ({"patch_size": 16}, "patch_size is 16, but the model has 14"),
        ({"downsample_ratio": 4}, "downsample_ratio is 4, but the model has 2"),
        ({"candidate_resolutions": [[384, 384]]}, r"candidate_resolutions\[0\] is \(384, 384\)"),
        ({"candidate_resolutions": []}, r"must be a list of .*1 to 1000 pairs"),
        ({"candidate_resolutions": [[56, 56], [56, 100]]}, r"\(56, 100\) is not a multiple"),
        ({"candidate_resolutions": [56]}, r"must be a list of \[width, height\] pairs"),
    ],
)
def test_processor_config_is_checked(mini_dir, mini_config, changes, message):
    edit(mini_dir / "processor_config.json", **changes)
    with pytest.raises(UserError, match=message):
        Processor.from_dir(mini_dir, mini_config)


def test_defaults_of_the_processor_config(mini_dir, mini_config):
    path = mini_dir / "processor_config.json"
    needed = ("candidate_resolutions", "patch_size", "downsample_ratio")
    values = {k: v for k, v in json.loads(path.read_text()).items() if k in needed}
    path.write_text(json.dumps(values))
    settings = Processor.from_dir(mini_dir, mini_config).settings
    assert settings.mask_prompt is True and settings.sft_format == "deepseek"
    del values["patch_size"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="'patch_size' is absent"):
        Processor.from_dir(mini_dir, mini_config)


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
def test_missing_and_malformed_files(mini_dir, mini_config, name):
    path = mini_dir / name
    path.write_text("{")
    with pytest.raises(UserError, match=f"{name}: not valid JSON"):
        Processor.from_dir(mini_dir, mini_config)
    path.write_text("[]")
    with pytest.raises(UserError, match=f"{name}: not valid JSON .expected an object"):
        Processor.from_dir(mini_dir, mini_config)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: not found"):
        Processor.from_dir(mini_dir, mini_config)


def test_a_tokenizer_that_is_none(mini_dir):
    path = mini_dir / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "decoder": {"type": "ByteLevel"}}))
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_dir(mini_dir)
    path.write_text(json.dumps({"decoder": {"type": "Metaspace"}}))
    with pytest.raises(UserError, match="decoder must be ByteLevel"):
        Tokenizer.from_dir(mini_dir)


def test_a_tokenizer_without_bos(mini_dir):
    edit(mini_dir / "tokenizer_config.json", bos_token=None)
    with pytest.raises(UserError, match="names a bos_token"):
        Tokenizer.from_dir(mini_dir)
    edit(mini_dir / "tokenizer_config.json", bos_token=7)
    with pytest.raises(UserError, match="bos_token must be a string of"):
        Tokenizer.from_dir(mini_dir)


def test_special_tokens_map_alone_is_enough(mini_dir, processor):
    (mini_dir / "tokenizer_config.json").write_text('{"unk_token": null}')
    tokenizer = Tokenizer.from_dir(mini_dir)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (520, 521, 522)
    assert len(tokenizer) == len(processor.tokenizer) == 531


def test_missing_tokens_are_added_in_the_originals_order(mini_dir):
    path = mini_dir / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    edit(path, added_tokens=values["added_tokens"][:2])
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        kept = {"bos_token": values["added_tokens"][0]["content"], "unk_token": None}
        kept["eos_token"] = values["added_tokens"][1]["content"]
        (mini_dir / name).write_text(json.dumps(kept))
    tokenizer = Tokenizer.from_dir(mini_dir)
    added = ["<｜▁pad▁｜>", "<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"]
    added += ["<|grounding|>", "<|User|>", "<|Assistant|>"]
    assert [tokenizer.token_to_id(token) for token in added] == list(range(522, 531))
    assert tokenizer.decode([523, 524, 64], skip_special_tokens=True) == "a"
    with pytest.raises(UserError, match="has no token '<video>'"):
        tokenizer.token_to_id("<video>")


def test_vocabulary_must_fit_the_model(mini_dir, mini_config):
    decoder = dataclasses.replace(mini_config.decoder, vocab_size=530)
    config = dataclasses.replace(mini_config, decoder=decoder)
    with pytest.raises(UserError, match=r"531 tokens \(largest id 530\).* vocab_size is 530"):
        Processor.from_dir(mini_dir, config)


@pytest.mark.parametrize("cleans_up", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_streamed_text_is_the_decoded_text(processor, cleans_up, skip):
    tokenizer = dataclasses.replace(processor.tokenizer, cleans_up=cleans_up)
    rng = random.Random(0)
    texts = ["中文 👨‍👩‍👧 é", " , it 's a ' b . No ?", "<|ref|>x<|/ref|>", "\ufffd é", "x" * 50]
    for round_number in range(300):
        if round_number % 2:  # mostly bytes that are not valid text
            ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(40))]
        else:
            ids = [i for _ in range(4) for i in tokenizer.encode(rng.choice(texts))]
        decoder = StreamDecoder(tokenizer, skip_special_tokens=skip)
        pieces, place = [], 0
        while place < len(ids):
            step = rng.choice([1, 1, 2, 3])
            pieces.append(decoder.push(ids[place : place + step]))
            place += step
        pieces.append(decoder.finish())
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_stream_never_gives_half_a_character(processor):
    tokenizer = processor.tokenizer
    ids = tokenizer.encode("a中b")
    assert len(ids) == 5  # three of them for the character, one per byte
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push([i]) for i in ids] == ["a", "", "", "中", "b"]
    assert decoder.finish() == ""
    decoder.push(ids[:2])
    assert decoder.finish() == "\ufffd"


def test_clean_up_of_spaces(mini_dir):
    edit(mini_dir / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    tokenizer = Tokenizer.from_dir(mini_dir)
    assert tokenizer.decode(tokenizer.encode("it 's so , no ?")) == "it's so, no?"
