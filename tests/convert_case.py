"""A micro model: writes its checkpoint in the original layout, and reads such checkpoints."""

from pathlib import Path

import tokenizers
from safetensors import safe_open
from tokenizers import decoders, models

from convert.random_source import write_weights
from vl2jax.config import AdaptorConfig, DecoderConfig, VisionConfig, VL2Config
from vl2jax.processing.tokenizer import CHAT_TOKENS, GROUNDING_TOKENS
from vl2jax.synthetic.tokens import BOS, EOS, IMAGE, PAD, write_processor_files

MICRO = VL2Config(
    vision=VisionConfig(image_size=28, patch_size=14, width=8, layers=2, heads=2, mlp_ratio=2),
    adaptor=AdaptorConfig(input_dim=8, n_embed=12),
    candidate_resolutions=((28, 28),),
    decoder=DecoderConfig(
        vocab_size=20,
        hidden_size=12,
        intermediate_size=10,
        moe_intermediate_size=6,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=5,
        q_lora_rank=None,
        qk_nope_head_dim=3,
        qk_rope_head_dim=2,
        v_head_dim=4,
        topk_method="noaux_tc",
        n_group=1,
        topk_group=1,
        scoring_func="sigmoid",
    ),
)


def write_source(directory: Path, **options) -> Path:
    """Writes a random checkpoint of the micro model, with a tokenizer of few tokens."""
    directory.mkdir()
    write_weights(directory, MICRO, **options)
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 3, "b": 4}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, PAD, IMAGE, *GROUNDING_TOKENS, *CHAT_TOKENS])
    write_processor_files(directory, MICRO, tokenizer)
    return directory


def read_all(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Reads all tensors of a directory with the library safetensors: dtype, shape, bytes."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                x = opened.get_tensor(name)
                assert name not in tensors
                tensors[name] = (str(x.dtype), x.shape, x.tobytes())
    return tensors
