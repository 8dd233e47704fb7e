"""The tokenizer and processor files of a model directory: reading them, and whether they fit."""

import pathlib
from collections.abc import Callable
from typing import TypeVar

from vl2jax.common.errors import UserError
from vl2jax.common.json_file import read_object
from vl2jax.config import VL2Config
from vl2jax.config.processor import CONFIG_FILE, ProcessorConfig
from vl2jax.processing.tokenizer import Tokenizer

T = TypeVar("T")


def read_settings(path: pathlib.Path) -> ProcessorConfig:
    """Reads `processor_config.json` of a model directory; raises UserError if it is not valid."""
    return ProcessorConfig.from_dict(read_object(path / CONFIG_FILE))


def file_problems(path: pathlib.Path, config: VL2Config | None) -> list[str]:
    """Returns all reasons for which `Processor.from_dir` would refuse a directory.

    Args:
      path: the directory.
      config: the architecture; None: the files are checked alone.
    """
    problems: list[str] = []

    def attempt(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except UserError as error:
            problems.append(str(error))
            return None

    settings = attempt(lambda: read_settings(path))
    tokenizer = attempt(lambda: read_tokenizer(path, settings))
    if config is not None and settings is not None:
        attempt(lambda: check_sizes(settings, config))
    if config is not None and tokenizer is not None:
        attempt(lambda: check_vocabulary(tokenizer, config))
    return problems


def read_tokenizer(path: pathlib.Path, settings: ProcessorConfig | None) -> Tokenizer:
    """Reads the tokenizer of a model directory.

    Args:
      path: the directory.
      settings: the processor settings, which name the image and the padding token; None: the
        names of the original.

    Raises:
      UserError: a file is missing or not valid.
    """
    names = ("image_token", "pad_token")
    named = {} if settings is None else {name: getattr(settings, name) for name in names}
    return Tokenizer.from_dir(path, **named)


def check_sizes(settings: ProcessorConfig, config: VL2Config) -> None:
    """Raises UserError if the processor's tile sizes differ from the model's."""
    side = config.vision.image_size
    for name, found, expected in (
        ("patch_size", settings.patch_size, config.vision.patch_size),
        ("downsample_ratio", settings.downsample_ratio, config.adaptor.downsample_ratio),
        ("candidate_resolutions[0]", [*settings.candidate_resolutions, None][0], (side, side)),
    ):
        if found != expected:
            raise UserError(f"{CONFIG_FILE}: {name} is {found}, but the model has {expected}")
    for size in settings.candidate_resolutions:
        if any(pixels <= 0 or pixels % side for pixels in size):
            raise UserError(
                f"{CONFIG_FILE}: candidate resolution {size} is not a multiple of image_size {side}"
            )


def check_vocabulary(tokenizer: Tokenizer, config: VL2Config) -> None:
    """Raises UserError if a token id is outside the embedding table."""
    largest, rows = max(tokenizer.max_id, len(tokenizer) - 1), config.decoder.vocab_size
    if largest >= rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens (largest id {largest}), but the model's"
            f" vocab_size is {rows}; use the tokenizer of this checkpoint"
        )
