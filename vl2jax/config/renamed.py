"""Fields of the decoder that newer versions of transformers write under other names."""

from collections.abc import Mapping
from typing import Any

from vl2jax.common.errors import shown
from vl2jax.config.schema import ConfigError


def with_old_names(language: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `language_config` with the field names of the original.

    `rope_parameters` becomes `rope_theta` and `rope_scaling`, `rope_type` in these becomes `type`,
    and the type "default" means no scaling.  Heads of keys and values that are null are as many as
    those of queries.  A list of end tokens becomes a tuple.

    Args:
      language: the object `language_config`.

    Raises:
      ConfigError: an old and a new name contradict each other.
    """
    fields = dict(language)
    rope = fields.pop("rope_parameters", None)
    if isinstance(rope, Mapping):
        scaling = dict(rope)
        theta = scaling.pop("rope_theta", None)
        if theta is not None:
            _set(fields, "rope_theta", theta, "rope_parameters.rope_theta")
        _set(fields, "rope_scaling", _scaling(scaling), "rope_parameters")
    elif rope is not None:
        raise ConfigError(f"config: rope_parameters must be an object, got {shown(rope)}")
    fields["rope_scaling"] = _scaling(fields.get("rope_scaling"))
    if fields.get("num_key_value_heads", 0) is None:
        fields["num_key_value_heads"] = fields.get("num_attention_heads", 32)
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = tuple(fields["eos_token_id"])
    return fields


def _set(fields: dict[str, Any], name: str, value: Any, new: str) -> None:
    """Sets a field that may already be there under its old name."""
    old = _scaling(fields.get(name)) if name == "rope_scaling" else fields.get(name)
    if old is not None and old != value:
        raise ConfigError(
            f"config: language_config has {name} {shown(old)} and {new} {shown(value)}; they must"
            " be the same"
        )
    fields[name] = value


def _scaling(scaling: Any) -> Any:
    """Returns `rope_scaling` with the old name of its type; None if it says no scaling."""
    if not isinstance(scaling, Mapping):
        return scaling
    fields = dict(scaling)
    if "rope_type" in fields:
        _set(fields, "type", fields.pop("rope_type"), "rope_type")
    return None if not fields or fields.get("type") == "default" else fields
