"""Validation of configurations; `VL2Config` reports all problems together."""

from typing import Any


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
        f"{name} = {value!r} is not supported (only {', '.join(map(repr, allowed))})"
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
        (
            not decoder.use_mla or bool(decoder.kv_lora_rank),
            f"use_mla needs kv_lora_rank, got {decoder.kv_lora_rank}",
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
