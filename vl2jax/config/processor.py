"""`processor_config.json`: settings of the processor, which runs on the host."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vl2jax.common.errors import UserError, shown
from vl2jax.config.inert import PROCESSOR_RELEASED, is_inert_in_processor
from vl2jax.config.schema import ConfigError, ignored_fields, read, read_pairs

CONFIG_FILE = "processor_config.json"

FORMATS = ("deepseek", "plain", "alignment")  # chat formats, see `processing.prompt`
_MOST_CHARACTERS = 200  # of a token


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessorConfig:
    """The fields of `processor_config.json`, with the defaults of the original class.

    Raises:
      UserError: a value is not supported.
    """

    candidate_resolutions: tuple[tuple[int, int], ...]  # (width, height)
    patch_size: int
    downsample_ratio: int
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    normalize: bool = True
    image_token: str = "<image>"
    pad_token: str = "<｜▁pad▁｜>"
    sft_format: str = "deepseek"
    mask_prompt: bool = True

    def __post_init__(self):
        half = (0.5, 0.5, 0.5)
        for name, value, supported in (
            ("image_mean", tuple(self.image_mean), half),
            ("image_std", tuple(self.image_std), half),
            ("normalize", self.normalize, True),
        ):
            if value != supported:
                raise ConfigError(
                    f"{CONFIG_FILE}: {name} = {shown(value)} is not supported (only {supported!r})"
                )
        for name in ("image_token", "pad_token"):
            token = getattr(self, name)
            if not token.strip() or len(token) > _MOST_CHARACTERS:
                raise ConfigError(
                    f"{CONFIG_FILE}: {name} must be a text of 1 to {_MOST_CHARACTERS} characters,"
                    f" got {shown(token)}"
                )
        check_format(self.sft_format)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ProcessorConfig":
        """Reads the parsed `processor_config.json`.

        Args:
          values: the JSON object.

        Raises:
          ConfigError: a field is unknown, missing, of the wrong type, or has an unsupported value.
        """
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if "candidate_resolutions" in values:
            kept["candidate_resolutions"] = read_pairs(values["candidate_resolutions"], CONFIG_FILE)
        return read(cls, kept, "", None, inert=is_inert_in_processor, file=CONFIG_FILE)

    @classmethod
    def ignored_fields(cls, values: Mapping[str, Any]) -> list[str]:
        """Fields of a valid file that are ignored and that the released files do not have."""
        return ignored_fields(cls, values, "", PROCESSOR_RELEASED)


def check_format(sft_format: str) -> None:
    """Raises UserError if the chat format is not supported."""
    if sft_format not in FORMATS:
        raise UserError(
            f"sft_format {shown(sft_format)} is not supported; expected one of {', '.join(FORMATS)}"
        )
