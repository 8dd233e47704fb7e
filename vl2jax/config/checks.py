"""Validation of configurations; `VL2Config` reports all problems together."""

from collections.abc import Mapping
from typing import Any

from vl2jax.common.errors import shown
from vl2jax.config.ranges import Range, at_least, outside

_SIZE = Range(1, 2**20)  # a width, a rank, or a number of heads
_HEAD = Range(0, 2**16)  # a part of a head; 0 where the attention does not have it
_LAYERS = Range(1, 1000)
_ID = Range(-1, 2**31 - 1)  # -1: none

# Range of each number of the architecture, by object of config.json.  `inconsistent` compares the
# numbers with each other, `too_large` bounds the whole model.
RANGES: Mapping[str, Mapping[str, Range]] = {
    "vision_config": {
        "image_size": Range(1, 2**14),
        "patch_size": Range(1, 2**12),
        "width": _SIZE,
        "layers": _LAYERS,
        "heads": _SIZE,
        "mlp_ratio": Range(0, 64, above=True),
        "num_classes": at_least(0),
        "num_recomputing_layers": at_least(0),
    },
    "projector_config": {
        "input_dim": _SIZE,
        "n_embed": _SIZE,
        "depth": Range(1, 64),
        "mlp_ratio": Range(1, 64),
        "downsample_ratio": Range(1, 64),
    },
    "language_config": {
        "vocab_size": Range(1, 2**24),
        "hidden_size": _SIZE,
        "intermediate_size": _SIZE,
        "moe_intermediate_size": _SIZE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _SIZE,
        "num_key_value_heads": _SIZE,
        "n_shared_experts": Range(0, 2**10),
        "n_routed_experts": Range(1, 2**14),
        "ep_size": at_least(1),
        "routed_scaling_factor": Range(0, 1e4, above=True),
        "kv_lora_rank": _SIZE,
        "q_lora_rank": _SIZE,
        "qk_rope_head_dim": _HEAD,
        "v_head_dim": _HEAD,
        "qk_nope_head_dim": _HEAD,
        "n_group": Range(1, 2**14),
        "topk_group": Range(1, 2**14),
        "num_experts_per_tok": Range(1, 2**10),
        "moe_layer_freq": Range(1, 1000),
        "first_k_dense_replace": Range(0, 1000),
        "aux_loss_alpha": Range(0, 1e3),
        "max_position_embeddings": Range(1, 2**24),  # float32 counts no further
        "initializer_range": Range(0, 1e3),
        "rms_norm_eps": Range(0, 1),
        "pad_token_id": _ID,
        "bos_token_id": _ID,
        "eos_token_id": _ID,
        "pretraining_tp": at_least(1),
        "rope_theta": Range(0, 1e12, above=True),
        "attention_dropout": Range(0, 1),
    },
    "language_config.rope_scaling": {
        "factor": Range(0, 1e6, above=True),
        "original_max_position_embeddings": Range(1, 2**24),
        "beta_fast": Range(0, 1e6, above=True),
        "beta_slow": Range(0, 1e6, above=True),
        "mscale": Range(0, 1e6),
        "mscale_all_dim": Range(0, 1e6),
    },
}
MOST_PARAMETERS, MOST_TENSORS, MOST_TILES = 10**13, 250_000, 1024


def out_of_range(config) -> list[str]:
    """Returns one message for each number outside its range in `RANGES`.

    Args:
      config: a `VL2Config`.
    """
    parts = {
        "vision_config": config.vision,
        "projector_config": config.adaptor,
        "language_config": config.decoder,
        "language_config.rope_scaling": config.decoder.rope_scaling,
    }
    return [
        message
        for where, part in parts.items()
        if part is not None
        for message in outside(part, RANGES[where], where)
    ]


def all_problems(config) -> list[str]:
    """Returns the messages of `unsupported` and `inconsistent`."""
    return unsupported(config) + inconsistent(config)


def too_large(config) -> list[str]:
    """Returns one message for each sum that no model has, before anything is made of that size.

    Args:
      config: a `VL2Config` without problems in single fields.
    """
    vision, adaptor, decoder = config.vision, config.adaptor, config.decoder
    dense = decoder.intermediate_size
    experts = (decoder.n_routed_experts or 0) + (decoder.n_shared_experts or 0)
    head = decoder.qk_nope_head_dim + decoder.qk_rope_head_dim + decoder.v_head_dim
    heads = decoder.num_attention_heads * head if decoder.use_mla else 3 * decoder.hidden_size
    inner = (decoder.kv_lora_rank or 0) + (decoder.q_lora_rank or 0)
    layer = 3 * max(dense, experts * decoder.moe_intermediate_size) + 2 * heads + inner
    parameters = (
        vision.layers * vision.width * (4 * vision.width + 2 * vision.intermediate_size)
        + vision.width * (vision.grid**2 + 3 * vision.patch_size**2)
        + sum(inputs * outputs for inputs, outputs in adaptor.layer_sizes)
        + 2 * decoder.vocab_size * decoder.hidden_size
        + decoder.num_hidden_layers * (layer * decoder.hidden_size + inner * heads)
    )
    tensors = 40 * (vision.layers + decoder.num_hidden_layers)
    tensors += 3 * decoder.num_hidden_layers * (decoder.n_routed_experts or 0)
    tiles = max(w * h for w, h in config.candidate_resolutions) // vision.image_size**2
    return [
        f"the model would have about {count:.3g} {what}, more than {most:.0e}; check the sizes"
        for count, what, most in (
            (parameters, "parameters", MOST_PARAMETERS),
            (tensors, "tensors", MOST_TENSORS),
            (tiles, "tiles for one image", MOST_TILES),
        )
        if count > most
    ]


def unsupported(config) -> list[str]:
    """Returns one message for each value that the original knows but this project does not support.

    Args:
      config: a `VL2Config`.
    """
    vision, adaptor, decoder = config.vision, config.adaptor, config.decoder
    moe = decoder.n_routed_experts is not None
    rows: list[tuple[str, Any, tuple]] = [
        ("tile_tag", config.tile_tag, ("2D",)),
        ("global_view_pos", config.global_view_pos, ("head", "tail")),
        ("vision_config.class_token", vision.class_token, (False,)),
        ("vision_config.global_pool", vision.global_pool, ("map",)),
        ("vision_config.ignore_head", vision.ignore_head, (True,)),
        ("vision_config.num_classes", vision.num_classes, (0,)),
        ("projector_config.projector_type", adaptor.projector_type, ("downsample_mlp_gelu",)),
        ("projector_config.token_pooling", adaptor.token_pooling, (False,)),
        ("language_config.hidden_act", decoder.hidden_act, ("silu",)),
        ("language_config.attention_dropout", decoder.attention_dropout, (0,)),
        ("language_config.tie_word_embeddings", decoder.tie_word_embeddings, (False,)),
        ("language_config.pretraining_tp", decoder.pretraining_tp, (1,)),
        ("language_config.ep_size", decoder.ep_size, (1,)),
    ]
    if moe:
        methods = ("greedy", "group_limited_greedy", "noaux_tc")
        rows.append(("language_config.topk_method", decoder.topk_method, methods))
        rows.append(("language_config.scoring_func", decoder.scoring_func, ("softmax", "sigmoid")))
    if decoder.rope_scaling is not None:
        kinds = ("linear", "dynamic", "yarn") if decoder.use_mla else ("linear", "dynamic")
        rows.append(("language_config.rope_scaling.type", decoder.rope_scaling.type, kinds))
    return [
        f"{name} = {shown(value)} is not supported (only {', '.join(map(repr, allowed))})"
        for name, value, allowed in rows
        if value not in allowed
    ]


def inconsistent(config) -> list[str]:
    """Returns one message for each group of sizes that contradict each other.

    Args:
      config: a `VL2Config`.
    """
    vision, adaptor, decoder = config.vision, config.adaptor, config.decoder
    rows = [
        (
            vision.patch_size <= vision.image_size,
            f"vision_config.patch_size {vision.patch_size} is larger than image_size"
            f" {vision.image_size}",
        ),
        (
            vision.intermediate_size > 0,
            f"vision_config.mlp_ratio {vision.mlp_ratio} of width {vision.width} leaves no width",
        ),
        (
            vision.width % vision.heads == 0,
            f"vision_config.width {vision.width} is not divisible by heads {vision.heads}",
        ),
        (
            adaptor.input_dim == vision.width,
            f"projector_config.input_dim {adaptor.input_dim} differs from vision_config.width"
            f" {vision.width}",
        ),
        (
            adaptor.n_embed == decoder.hidden_size,
            f"projector_config.n_embed {adaptor.n_embed} differs from language_config.hidden_size"
            f" {decoder.hidden_size}",
        ),
        (
            bool(config.candidate_resolutions)
            and all(
                side > 0 and side % vision.image_size == 0
                for pair in config.candidate_resolutions
                for side in pair
            ),
            f"candidate_resolutions must be multiples of image_size {vision.image_size}",
        ),
        (
            decoder.use_mla
            or (
                decoder.hidden_size % decoder.num_attention_heads == 0
                and decoder.num_key_value_heads == decoder.num_attention_heads
            ),
            f"multi-head attention needs hidden_size {decoder.hidden_size} divisible by"
            f" num_attention_heads {decoder.num_attention_heads} and as many"
            f" num_key_value_heads (got {decoder.num_key_value_heads}; grouped-query attention is"
            " not supported)",
        ),
        *(
            (
                not decoder.use_mla or bool(getattr(decoder, name)),
                f"use_mla needs {name} above 0, got {getattr(decoder, name)}",
            )
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        ),
        (
            (decoder.qk_rope_head_dim if decoder.use_mla else decoder.qk_head_dim) % 2 == 0,
            "the width of a head that RoPE rotates must be even",
        ),
    ]
    if decoder.n_routed_experts is not None:
        top_k, experts = decoder.num_experts_per_tok, decoder.n_routed_experts
        rows.append(
            (
                top_k is not None and 0 < top_k <= experts,
                f"num_experts_per_tok {top_k} must be 1 to n_routed_experts {experts}",
            )
        )
        if decoder.topk_method != "greedy":
            groups, kept = decoder.n_group, decoder.topk_group
            fits = groups and kept and experts % groups == 0 and kept <= groups
            if fits and decoder.topk_method == "noaux_tc":
                fits = experts // groups >= 2  # a group's score is the sum of its two best experts
            rows.append(
                (
                    bool(fits) and top_k is not None and top_k <= experts // groups * kept,
                    f"n_group {groups} must divide n_routed_experts {experts}, and topk_group"
                    f" {kept} groups must hold num_experts_per_tok {top_k} experts",
                )
            )
    return [message for holds, message in rows if not holds]
