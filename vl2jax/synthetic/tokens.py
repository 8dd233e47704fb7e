"""Trains a tokenizer, and writes the tokenizer and processor files of a model directory."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from vl2jax.config import VL2Config
from vl2jax.processing.tokenizer import CHAT_TOKENS, GROUNDING_TOKENS
from vl2jax.synthetic.source import Synthetic
from vl2jax.synthetic.words import WORDS

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE = "<image>"
VOCABULARY = 1536  # number of tokens, including special tokens
SAMPLE = 3000  # number of training rows from which the merges are learnt
# Pre-tokenization: no merge crosses these pieces.  Single digits, so that numbers are read and
# written digit by digit; the comma between coordinates; single Chinese characters, so that a name
# has the same tokens in every sentence; words with the space before them; punctuation; white space.
PIECES = r", (?=\d)|\d|\p{Han}| ?(?:(?!\p{Han})\p{L})+| ?[^\s\p{L}\d]+|\s+"


def make_tokenizer() -> tokenizers.Tokenizer:
    """Returns the byte-level BPE tokenizer of the synthetic data, which is deterministic.

    Its vocabulary has all bytes, so it encodes any text.  bos, eos and pad are the first tokens;
    the image placeholder, grounding tokens and chat tokens are the last.
    """
    return tokenizers.Tokenizer.from_str(_trained())


@functools.cache
def _trained() -> str:
    pieces = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return train_bpe(_texts(), VOCABULARY, pre_tokenizers.Sequence([pieces, level])).to_str()


def train_bpe(
    corpus: Iterable[str], vocabulary: int, pieces: pre_tokenizers.PreTokenizer
) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE tokenizer, with special tokens at both ends of its vocabulary.

    Args:
      corpus: texts without special tokens.
      vocabulary: number of tokens, including special tokens.
      pieces: the pre-tokenizer.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.ByteLevel()
    last = [IMAGE, *GROUNDING_TOKENS, *CHAT_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(last),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(last)
    return tokenizer


def _texts() -> Iterable[str]:
    """The training corpus: questions and answers of rows, and all words."""
    source = Synthetic("train", 0)
    for index in range(SAMPLE):
        for turn in source.conversation(index)[1]:
            for text in (f": {turn.question}\n\n", ":", turn.answer):
                for token in GROUNDING_TOKENS:
                    text = text.replace(token, "\x00")
                yield from filter(None, text.split("\x00"))
    for word, meaning in WORDS.items():
        yield from [word, meaning] * 4


def write_processor_files(
    directory: Path, config: VL2Config, tokenizer: tokenizers.Tokenizer | None = None
) -> None:
    """Writes the tokenizer and processor files of a model directory.

    Args:
      directory: an existing directory.
      config: architecture.
      tokenizer: a tokenizer with the special tokens of this module; None: `make_tokenizer()`.
    """
    (tokenizer or make_tokenizer()).save(str(directory / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    chat = {"additional_special_tokens": list(CHAT_TOKENS)}
    processor = {
        "candidate_resolutions": config.candidate_resolutions,
        "patch_size": config.vision.patch_size,
        "downsample_ratio": config.adaptor.downsample_ratio,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "normalize": True,
        "image_token": IMAGE,
        "pad_token": PAD,
        "add_special_token": False,
        "sft_format": "deepseek",
        "mask_prompt": False,
        "ignore_id": -100,
        "processor_class": "DeepseekVLV2Processor",
    }
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.decoder.max_position_embeddings,
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
    }
    for name, content in (
        ("processor_config.json", processor),
        ("special_tokens_map.json", named | chat),
        ("tokenizer_config.json", settings | named),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (directory / name).write_text(text + "\n", encoding="utf-8")
