"""Writes a small random checkpoint in the original layout, to try everything without a download.

    python -m convert.random_hf OUT_DIR [--seed N]

The model has all parts of the released base model (odd patch grid with pixels left over, MLA, a
dense layer, shared and routed experts, sigmoid router with correction bias) and 2.3 M parameters in
bfloat16.  Its answers are random.
"""

from pathlib import Path

import tokenizers
from tokenizers import pre_tokenizers

from convert.random_source import write_weights
from convert.staging import run_on_cpu, staged_directory
from convert.stopping import Stop, run_stoppable
from vl2jax.cli.command import Parser, whole
from vl2jax.common.paths import path_flag
from vl2jax.config import AdaptorConfig, DecoderConfig, VisionConfig, VL2Config
from vl2jax.synthetic.tokens import train_bpe, write_processor_files

SIDE, PATCH = 76, 14  # 5 patches and 6 pixels left over, as 384 is 27 patches and 6 pixels
VOCABULARY = 480
RESOLUTIONS = tuple(
    (wide * SIDE, high * SIDE) for wide in range(1, 10) for high in range(1, 10) if wide * high < 10
)
# The texts on which the tokenizer is trained.
CORPUS = (
    "The picture shows a red square, a green circle and a blue triangle on a light background.",
    "What is in the image? There are three shapes and the digits one, two and three.",
    "Describe the shapes from left to right, then read the numbers below them.",
    "Where is the yellow star? It is above the black line, near the right edge of the picture.",
    "How many of the circles are larger than the square? None of them, they are all smaller.",
)


def demo_config() -> VL2Config:
    """Returns the architecture of the random model."""
    decoder = DecoderConfig(
        vocab_size=VOCABULARY + 32,  # has unused rows, as in the released models
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=2,
        n_routed_experts=12,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,  # large enough that greedy decoding does not repeat one token
        torch_dtype="bfloat16",
    )
    return VL2Config(
        vision=VisionConfig(image_size=SIDE, patch_size=PATCH, width=72, layers=3, heads=4),
        adaptor=AdaptorConfig(input_dim=72, n_embed=decoder.hidden_size),
        decoder=decoder,
        candidate_resolutions=RESOLUTIONS,
        torch_dtype="bfloat16",
    )


def make_tokenizer() -> tokenizers.Tokenizer:
    """Returns a byte-level BPE tokenizer that is trained on `CORPUS`, with special tokens."""
    return train_bpe(CORPUS, VOCABULARY, pre_tokenizers.ByteLevel(add_prefix_space=False))


def write_checkpoint(directory: Path, *, seed: int = 0) -> None:
    """Writes config, weights, tokenizer and processor files into an existing directory."""
    config = demo_config()
    write_weights(directory, config, seed=seed)
    write_processor_files(directory, config, make_tokenizer())


def _main() -> None:
    parser = Parser("python -m convert.random_hf", __doc__)
    parser.add_argument("out_dir", type=path_flag(), help="directory to make")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the random weights")
    args = parser.parse_args()

    def work(_: Stop) -> None:
        with staged_directory(args.out_dir, nbytes=2**23) as partial:
            write_checkpoint(partial, seed=args.seed)

    run_stoppable(work, args.out_dir)
    print(f"wrote {args.out_dir}")


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_on_cpu(_main)


if __name__ == "__main__":
    raise SystemExit(main())
