"""`processor_config.json`: settings of the processor, which runs on the host."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from vl2jax.common.errors import UserError

CONFIG_FILE = "processor_config.json"

FORMATS = ("deepseek", "plain", "alignment")  # chat formats, see `processing.prompt`

# Fields of the original that have no effect here; `ignore_id` because targets are given by a mask.
_UNREAD = frozenset(["processor_class", "auto_map", "add_special_token", "ignore_id"])


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
                raise UserError(
                    f"{CONFIG_FILE}: {name} = {value!r} is not supported (only {supported!r})"
                )
        check_format(self.sft_format)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ProcessorConfig":
        """Reads the parsed `processor_config.json`.

        Args:
          values: the JSON object.

        Raises:
          UserError: a field is unknown, missing, of the wrong type, or has an unsupported value.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        kept = {name: value for name, value in values.items() if name not in _UNREAD}
        for name in kept:
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise UserError(f"{CONFIG_FILE}: unknown field {name!r}{hint}")
        for name, field in fields.items():
            if name not in kept and field.default is dataclasses.MISSING:
                raise UserError(f"{CONFIG_FILE}: {name!r} is absent; take it from the checkpoint")
            expected = field.type if isinstance(field.type, type) else (list, tuple)
            if name in kept and not isinstance(kept[name], expected):
                raise UserError(f"{CONFIG_FILE}: {name} is {kept[name]!r}, expected {field.type}")
        try:
            kept["candidate_resolutions"] = tuple(
                (int(width), int(height)) for width, height in kept["candidate_resolutions"]
            )
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{CONFIG_FILE}: candidate_resolutions must be a list of [width, height] pairs"
            ) from error
        return cls(**kept)


def check_format(sft_format: str) -> None:
    """Raises UserError if the chat format is not supported."""
    if sft_format not in FORMATS:
        raise UserError(
            f"sft_format {sft_format!r} is not supported; expected one of {', '.join(FORMATS)}"
        )
