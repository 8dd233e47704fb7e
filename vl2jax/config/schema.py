"""Reads and writes dataclasses as JSON objects in the Hugging Face schema."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from vl2jax.common.errors import UserError


class ConfigError(UserError):
    """An invalid configuration; the message names the field, what was expected, and the fix."""


# Fields that transformers writes into any config.json and the original model never reads.
_INERT = frozenset(
    [
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation",
        "architectures",
        "auto_map",
        "model_type",
        "attribute_map",
        "attn_implementation",
        "is_composition",
        "add_cross_attention",
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torchscript",
        "typical_p",
        "use_bfloat16",
    ]
)
# Fields that transformers repeats in configs that do not use them.
_GENERIC = frozenset(
    [
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "torch_dtype",
        "use_cache",
        "transformers_version",
    ]
)


def read(cls, values: Mapping[str, Any], where: str, model_type: str | None):
    """Builds a dataclass from a JSON object.

    Args:
      cls: the dataclass.
      values: the JSON object.
      where: name of the object in error messages; "" at the top level.
      model_type: required value of the field `model_type` if it is present; None: any.

    Raises:
      ConfigError: a field is unknown, missing or of the wrong type; lists all problems.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    kept, problems = {}, []
    found = values.get("model_type", model_type)
    if model_type is not None and found != model_type:
        problems.append(f"{prefix}model_type must be {model_type!r}, got {found!r}")
    for name, value in values.items():
        if name in fields:
            if not _type_fits(value, fields[name].type):
                problems.append(f"{prefix}{name} must be {fields[name].type}, got {value!r}")
            kept[name] = value
        elif name not in _INERT and name not in _GENERIC:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"unknown field {prefix}{name!s}{hint}")
    if problems:
        raise ConfigError("config: " + "; ".join(problems))
    try:
        return cls(**kept)
    except TypeError as error:  # a required field is missing
        raise ConfigError(f"config: {where}: {error}") from error


def _type_fits(value: Any, expected: Any) -> bool:
    """Whether a JSON value has the annotated type; an int counts as float, a bool not as int."""
    if isinstance(value, bool):
        return expected in (bool, bool | None)
    if isinstance(value, int) and expected is float:
        return True
    return isinstance(value, expected) if isinstance(expected, type) else _union(value, expected)


def _union(value: Any, expected: Any) -> bool:
    args = getattr(expected, "__args__", ())
    if getattr(expected, "__origin__", None) is tuple:
        return isinstance(value, tuple)
    return any(isinstance(value, arg) for arg in args)


def write(config) -> dict[str, Any]:
    """Returns the fields of a dataclass, without optional fields that are None.

    Optional fields are those that only some released files have.
    """
    optional = {"lm_head", "rm_head", "torch_dtype", "transformers_version"}
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {k: v for k, v in values.items() if not (k in optional and v is None)}
