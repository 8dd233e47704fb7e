"""Architecture of DeepSeek-VL2 as frozen dataclasses with Hugging Face field names.

`VL2Config.from_hf` reads a released `config.json`.  Fields that the file omits take the defaults of
the original configuration classes.  Values that this project does not support are rejected by name,
never ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from vl2jax.common.errors import joined, shown
from vl2jax.config.checks import all_problems, out_of_range, too_large
from vl2jax.config.inert import RELEASED
from vl2jax.config.renamed import with_old_names
from vl2jax.config.schema import ConfigError, ignored_fields, read, read_pairs, write

T = TypeVar("T")


def required(value: T | None) -> T:
    """Returns an optional field that this kind of model must have; `checks.py` has validated it."""
    assert value is not None
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """SigLIP vision tower (paper section 2, "Vision Encoder")."""

    model_name: str = "siglip_large_patch16_384"
    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4
    global_pool: str = "map"
    ignore_head: bool = True
    class_token: bool = False
    num_classes: int = 0
    use_checkpoint: bool = False
    weight_init: str = "skip"
    deterministic: bool = False
    num_recomputing_layers: int = 0

    @property
    def grid(self) -> int:
        """Patches per tile side; pixels after the last whole patch are cut off."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def intermediate_size(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptorConfig:
    """Vision-language adaptor: 2x2 space-to-depth and an MLP (paper section 2)."""

    projector_type: str = "downsample_mlp_gelu"
    input_dim: int = 1152
    n_embed: int = 2048
    depth: int = 2
    mlp_ratio: int = 1
    downsample_ratio: int = 2
    token_pooling: bool = False

    @property
    def layer_sizes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each linear layer; at least two, as in the original."""
        hidden = self.n_embed * self.mlp_ratio
        first = (self.input_dim * self.downsample_ratio**2, hidden)
        return (first, *[(hidden, hidden)] * (self.depth - 2), (hidden, self.n_embed))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """RoPE scaling: `linear`, `dynamic` (NTK) or `yarn`, as in the original."""

    type: str
    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1
    mscale_all_dim: float = 0


class LayerRun(NamedTuple):
    """Consecutive decoder layers of one kind, which share one parameter stack and one scan.

    Attributes:
      name: kind and first layer, such as "moe_1".
      is_moe: whether the layers route to experts.
      first: index of the first layer.
      count: number of layers.
    """

    name: str
    is_moe: bool
    first: int
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """DeepSeekMoE decoder with MLA or multi-head attention (paper section 2, Table 1)."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    ep_size: int = 1
    routed_scaling_factor: float = 1.0
    kv_lora_rank: int | None = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    topk_method: str = "gready"
    n_group: int | None = None
    topk_group: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | tuple[int, ...] | None = 100001
    pretraining_tp: int = 1
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_mla: bool = True
    lm_head: bool | None = None  # in the released files, but unused
    rm_head: bool | None = None  # likewise
    torch_dtype: str | None = None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head, including the part that RoPE rotates."""
        if self.use_mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.hidden_size // self.num_attention_heads

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) routes to experts."""
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @property
    def layer_runs(self) -> tuple[LayerRun, ...]:
        """All layers, grouped into maximal runs of one kind."""
        runs: list[LayerRun] = []
        for layer in range(self.num_hidden_layers):
            moe = self.is_moe(layer)
            if runs and runs[-1].is_moe == moe:
                runs[-1] = runs[-1]._replace(count=runs[-1].count + 1)
            else:
                runs.append(LayerRun(f"{'moe' if moe else 'dense'}_{layer}", moe, layer, 1))
        return tuple(runs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VL2Config:
    """The whole model.

    Raises:
      ConfigError: a value is not supported, or sizes are inconsistent; lists all problems.
    """

    vision: VisionConfig = VisionConfig()
    adaptor: AdaptorConfig = AdaptorConfig()
    decoder: DecoderConfig = DecoderConfig()
    # The original's default is the placeholder string "tile_tag", which the original rejects.
    tile_tag: str = "2D"
    global_view_pos: str = "head"
    candidate_resolutions: tuple[tuple[int, int], ...] = ((384, 384),)  # (width, height)
    torch_dtype: str | None = None
    transformers_version: str | None = None

    def __post_init__(self):
        for check in (out_of_range, all_problems, too_large):  # each needs what the one before says
            if problems := check(self):
                raise ConfigError("config: " + joined(problems))

    @property
    def tile_grid(self) -> int:
        """Projected tokens per tile side: ceil(patches / downsample_ratio)."""
        return -(-self.vision.grid // self.adaptor.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return self.tile_grid**2

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "VL2Config":
        """Reads a configuration in the Hugging Face schema.

        Args:
          config: the parsed `config.json`.

        Raises:
          ConfigError: a field is unknown, missing, of the wrong type, or has an unsupported value.
        """
        top = dict(config)
        if not isinstance(top.get("language_config"), Mapping):
            raise ConfigError(
                "config: 'language_config' is absent; expected the config.json of a DeepSeek-VL2"
                f" checkpoint, got fields {shown(sorted(top))}"
            )
        vision = read(VisionConfig, top.pop("vision_config", {}), "vision_config", "vision")
        adaptor = read(
            AdaptorConfig, top.pop("projector_config", {}), "projector_config", "mlp_projector"
        )
        language = with_old_names(top.pop("language_config"))
        if language.get("rope_scaling") is not None:
            language["rope_scaling"] = read(
                RopeScaling, language["rope_scaling"], "language_config.rope_scaling", None
            )
        decoder = read(DecoderConfig, language, "language_config", "deepseek_v2")
        if "tile_tag" not in top:
            raise ConfigError("config: 'tile_tag' is absent; set it to '2D'")
        if "candidate_resolutions" in top:
            top["candidate_resolutions"] = read_pairs(top["candidate_resolutions"])
        top |= {"vision": vision, "adaptor": adaptor, "decoder": decoder}
        return read(cls, top, "", "deepseek_vl_v2")

    @classmethod
    def ignored_fields(cls, config: Mapping[str, Any]) -> list[str]:
        """Fields of a valid `config.json` that are ignored and that released files do not have."""
        sections = {
            "": (cls, config),
            "vision_config": (VisionConfig, config.get("vision_config", {})),
            "projector_config": (AdaptorConfig, config.get("projector_config", {})),
            "language_config": (DecoderConfig, with_old_names(config["language_config"])),
        }
        released = {*RELEASED, *sections}
        return [
            name
            for where, (part, values) in sections.items()
            for name in ignored_fields(part, values, where, released)
        ]

    def to_hf(self) -> dict[str, Any]:
        """Returns the Hugging Face schema with every field; `from_hf` is the inverse."""
        top = write(self)
        vision = {"model_type": "vision", **write(top.pop("vision"))}
        projector = {"model_type": "mlp_projector", **write(top.pop("adaptor"))}
        language = {
            "architectures": ["DeepseekV2ForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_deepseek.DeepseekV2Config",
                "AutoModel": "modeling_deepseek.DeepseekV2Model",
                "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
            },
            "model_type": "deepseek_v2",
            **write(top.pop("decoder")),
        }
        top["candidate_resolutions"] = [list(pair) for pair in self.candidate_resolutions]
        if self.decoder.rope_scaling is not None:
            language["rope_scaling"] = dataclasses.asdict(self.decoder.rope_scaling)
        return {
            "model_type": "deepseek_vl_v2",
            **top,
            "vision_config": vision,
            "projector_config": projector,
            "language_config": language,
        }


_SIDE = 384
RELEASED_RESOLUTIONS = tuple(
    (w * _SIDE, h * _SIDE)
    for w, h in (
        *((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1)),
        *((1, 6), (6, 1), (2, 3), (3, 2), (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2)),
        *((1, 9), (9, 1), (3, 3)),
    )
)


def _released(**decoder) -> VL2Config:
    """A released size: shared fields plus the decoder fields that differ between sizes."""
    shared = dict(
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        max_position_embeddings=4096,
        rm_head=False,
        torch_dtype="bfloat16",
    )
    return VL2Config(
        vision=VisionConfig(
            model_name="siglip_so400m_patch14_384",
            patch_size=14,
            width=1152,
            layers=27,
            mlp_ratio=3.7362,
        ),
        adaptor=AdaptorConfig(n_embed=decoder["hidden_size"]),
        decoder=DecoderConfig(**shared, **decoder),
        candidate_resolutions=RELEASED_RESOLUTIONS,
        torch_dtype="bfloat16",
        transformers_version="4.38.2",
    )


def tiny() -> VL2Config:
    """DeepSeek-VL2-Tiny: 3.4 B parameters, multi-head attention (Table 1)."""
    return _released(
        vocab_size=129280,
        hidden_size=1280,
        intermediate_size=6848,
        moe_intermediate_size=896,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=10,
        n_routed_experts=64,
        topk_method="greedy",
        use_mla=False,
        kv_lora_rank=None,
        qk_nope_head_dim=0,
        qk_rope_head_dim=0,
        v_head_dim=0,
        bos_token_id=0,
        eos_token_id=1,
        lm_head=True,
    )


def small() -> VL2Config:
    """DeepSeek-VL2-Small: 16.1 B parameters, MLA, softmax router (Table 1)."""
    return _released(
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_routed_experts=64,
        topk_method="greedy",
    )


def base() -> VL2Config:
    """DeepSeek-VL2: 27.5 B parameters, MLA, sigmoid router with correction bias (Table 1)."""
    return _released(
        vocab_size=129280,
        hidden_size=2560,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        n_routed_experts=72,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
        bos_token_id=0,
        eos_token_id=1,
        lm_head=False,
    )


PRESETS = {"tiny": tiny, "small": small, "base": base}
