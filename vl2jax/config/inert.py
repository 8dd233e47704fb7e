"""Fields of `config.json` and `processor_config.json` that do not change the model.

The original's files, and the programs that load and save them again, have many fields that no
computation reads.  This module is the one table of them.  A field that is neither here nor in a
dataclass of the architecture is refused, because it may change the model.

Patterns are those of `fnmatch`.
"""

import fnmatch
import functools
import re
from collections.abc import Mapping
from typing import Any

# Fields of the released `config.json` files, and those that every program repeats.
RELEASED = (
    *("architectures", "auto_map", "model_type", "_name_or_path", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype"),
    *("use_cache", "dtype"),
)

# Fields that other programs write, by program.  Conversion names them once.
PROGRAMS: Mapping[str, tuple[str, ...]] = {
    "transformers": (
        "_*",  # private: _attn_implementation_autoset, _commit_hash, _experts_implementation, ...
        *("attn_implementation", "experts_implementation", "attribute_map", "is_composition"),
        *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "sub_configs"),
        *("chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id"),
        *("diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
        *("exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id"),
        *("forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id"),
        *("length_penalty", "max_length", "max_new_tokens", "min_length", "min_new_tokens"),
        *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "min_p"),
        *("num_return_sequences", "output_attentions", "output_hidden_states", "output_scores"),
        *("output_router_logits", "prefix", "problem_type", "pruned_heads", "renormalize_logits"),
        *("remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate"),
        *("sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "top_k"),
        *("top_p", "typical_p", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class"),
        *("torchscript", "use_bfloat16", "use_return_dict", "keys_to_ignore_at_inference"),
        *("base_model_*_plan", "gradient_checkpointing", "use_flash_attention_2", "use_flash_attn"),
        *("image_token_id", "image_token_index", "router_aux_loss_coef", "initializer_factor"),
        "transformers.js_config",
        # Repeats what other fields of the decoder say.
        *("head_dim", "qk_head_dim", "mlp_layer_types", "num_local_experts"),
        # The weights of the next-token layers of DeepSeek-V3 are refused by name if they are there.
        "num_nextn_predict_layers",
        # What the weights are stored in.  Conversion looks at the tensors themselves.
        "quantization_config",
    ),
    "PEFT": ("peft_*", "base_model_name_or_path", "inference_mode", "task_type"),
    "unsloth": ("unsloth_*",),
    "TRL, ms-swift, LLaMA-Factory, axolotl": (
        *("*_version", "chat_template", "model_max_length", "tokenizer_model_max_length"),
        *("tokenizer_padding_side", "padding_side", "truncation_side", "use_liger_kernel"),
    ),
}

# Fields that change nothing with these values, and are refused with others.
NEUTRAL: Mapping[str, tuple] = {
    "mlp_bias": (False,),
    "attention_factor": (None,),
    "partial_rotary_factor": (None, 1),
    "rope_interleave": (None, True),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "use_qk_norm": (None, False),
}

# Fields of `processor_config.json` that have no effect here.  `ignore_id`: targets are given by a
# mask.  `chat_template`: the chat formats are those of the original's processor.
PROCESSOR_RELEASED = ("processor_class", "auto_map", "add_special_token", "ignore_id")
PROCESSOR_PROGRAMS = (
    *("_*", "*_version", "unsloth_*", "chat_template", "tokenizer_class", "image_processor_type"),
    *("image_processor", "image_processor_class", "feature_extractor*", "tokenizer", "tokenizers"),
    *("padding_side", "truncation_side", "model_max_length", "return_tensors", "num_image_tokens"),
    *("do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize", "do_image_splitting"),
    *("rescale_factor", "resample", "size", "crop_size", "data_format", "input_data_format"),
    *("device", "disable_grouping", "image_seq_length", "video_processor", "model_input_names"),
)


@functools.cache
def _matcher(patterns: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(fnmatch.translate, patterns)))


_WRITTEN = tuple(pattern for patterns in PROGRAMS.values() for pattern in patterns)


def is_inert(name: str, value: Any) -> bool:
    """Whether a field of `config.json` does not change the model.

    Args:
      name: the field.
      value: its value.  A field that is null says nothing, whatever its name.
    """
    return (
        value is None
        or name in RELEASED
        or _matcher(_WRITTEN).match(name) is not None
        or any(value == neutral for neutral in NEUTRAL.get(name, ()))
    )


def is_inert_in_processor(name: str, value: Any) -> bool:
    """Whether a field of `processor_config.json` has no effect here."""
    patterns = (*PROCESSOR_RELEASED, *PROCESSOR_PROGRAMS)
    return value is None or _matcher(patterns).match(name) is not None
