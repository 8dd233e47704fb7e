"""The table that maps the original's tensor names to our parameters; used in both directions.

A row is

    original name | parameter path | original axes -> our axes | when

`axes` defines the original shape, our shape and the conversion, which is a reshape and a transpose;
the inverse reads the row from right to left.  `(H K)` is one original axis that is split in two; a
number is an axis of this size; a `1` that is only on the left is squeezed.  `{layer}` and
`{expert}` become the leading axes of a stacked parameter; `{run}` is the run of decoder layers to
which the layer belongs (`DecoderConfig.layer_runs`).  A row applies to a layer if the layer has all
properties under `when`.  Tensors of a row with the path `DROP` are not converted.

Axes of the vision tower: W width, H heads, K head width, F ffn, P patches, p q pixels of a patch.
Axes of the decoder: D width, H heads, K head width (multi-head attention), NR query or key head
(nope + rope), NV key and value head (nope + v), V value head, C kv_lora_rank, CR kv_lora_rank +
rope, Q q_lora_rank, F ffn, S shared experts' ffn, M one expert's ffn, E experts.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from convert.axes import Axes, sized
from vl2jax.config import VL2Config

DROP = None
DROP_REASON = (
    "the attention pooling head of the vision tower is stored in the released files but never used"
)


class Row(NamedTuple):
    """A row of the table, see the docstring of the module."""

    hf: str
    path: str | None
    axes: str
    when: str = ""


_BLOCK = "vision.blocks.{layer}."
_POOL = "vision.attn_pool."
_LAYER = "language.model.layers.{layer}."
_ATTN = _LAYER + "self_attn."
_RUN = "params/decoder/{run}/"
_OUR_ATTN = _RUN + "self_attn/"
_OUR_BLOCK = "params/vision/blocks/"

# fmt: off
TABLE: tuple[Row, ...] = tuple(itertools.starmap(Row, (
    ("image_newline", "params/image_newline", "D -> D"),
    ("view_seperator", "params/view_seperator", "D -> D"),

    ("vision.pos_embed", "params/vision/pos_embed", "1 P W -> P W"),
    ("vision.patch_embed.proj.weight", "params/vision/patch_embed/kernel", "W 3 p q -> p q 3 W"),
    ("vision.patch_embed.proj.bias", "params/vision/patch_embed/bias", "W -> W"),
    (_BLOCK + "norm1.weight", _OUR_BLOCK + "norm1/scale", "W -> W"),
    (_BLOCK + "norm1.bias", _OUR_BLOCK + "norm1/bias", "W -> W"),
    (_BLOCK + "attn.qkv.weight", _OUR_BLOCK + "attn/qkv/kernel", "(3 H K) W -> W 3 H K"),
    (_BLOCK + "attn.qkv.bias", _OUR_BLOCK + "attn/qkv/bias", "(3 H K) -> 3 H K"),
    (_BLOCK + "attn.proj.weight", _OUR_BLOCK + "attn/proj/kernel", "W (H K) -> H K W"),
    (_BLOCK + "attn.proj.bias", _OUR_BLOCK + "attn/proj/bias", "W -> W"),
    (_BLOCK + "norm2.weight", _OUR_BLOCK + "norm2/scale", "W -> W"),
    (_BLOCK + "norm2.bias", _OUR_BLOCK + "norm2/bias", "W -> W"),
    (_BLOCK + "mlp.fc1.weight", _OUR_BLOCK + "mlp/fc1/kernel", "F W -> W F"),
    (_BLOCK + "mlp.fc1.bias", _OUR_BLOCK + "mlp/fc1/bias", "F -> F"),
    (_BLOCK + "mlp.fc2.weight", _OUR_BLOCK + "mlp/fc2/kernel", "W F -> F W"),
    (_BLOCK + "mlp.fc2.bias", _OUR_BLOCK + "mlp/fc2/bias", "W -> W"),
    ("vision.norm.weight", "params/vision/norm/scale", "W -> W"),
    ("vision.norm.bias", "params/vision/norm/bias", "W -> W"),

    (_POOL + "latent", DROP, "1 1 W -> W"),
    (_POOL + "q.weight", DROP, "W (H K) -> W H K"),
    (_POOL + "q.bias", DROP, "W -> W"),
    (_POOL + "kv.weight", DROP, "(2 H K) W -> 2 H K W"),
    (_POOL + "kv.bias", DROP, "(2 H K) -> 2 H K"),
    (_POOL + "proj.weight", DROP, "W (H K) -> W H K"),
    (_POOL + "proj.bias", DROP, "W -> W"),
    (_POOL + "norm.weight", DROP, "W -> W"),
    (_POOL + "norm.bias", DROP, "W -> W"),
    (_POOL + "mlp.fc1.weight", DROP, "F W -> F W"),
    (_POOL + "mlp.fc1.bias", DROP, "F -> F"),
    (_POOL + "mlp.fc2.weight", DROP, "W F -> W F"),
    (_POOL + "mlp.fc2.bias", DROP, "W -> W"),

    # Odd numbers are the activations between the linear layers.
    ("projector.layers.{twice}.weight", "params/adaptor/layers_{layer}/kernel", "out in -> in out"),
    ("projector.layers.{twice}.bias", "params/adaptor/layers_{layer}/bias", "out -> out"),

    ("language.model.embed_tokens.weight", "params/decoder/embed_tokens/embedding",
     "vocab D -> vocab D"),
    (_LAYER + "input_layernorm.weight", _RUN + "input_layernorm/scale", "D -> D"),
    # Multi-head attention (Tiny).
    (_ATTN + "q_proj.weight", _OUR_ATTN + "q_proj/kernel", "(H K) D -> D H K", "mha"),
    (_ATTN + "q_proj.bias", _OUR_ATTN + "q_proj/bias", "(H K) -> H K", "mha bias"),
    (_ATTN + "k_proj.weight", _OUR_ATTN + "k_proj/kernel", "(H K) D -> D H K", "mha"),
    (_ATTN + "k_proj.bias", _OUR_ATTN + "k_proj/bias", "(H K) -> H K", "mha bias"),
    (_ATTN + "v_proj.weight", _OUR_ATTN + "v_proj/kernel", "(H K) D -> D H K", "mha"),
    (_ATTN + "v_proj.bias", _OUR_ATTN + "v_proj/bias", "(H K) -> H K", "mha bias"),
    (_ATTN + "o_proj.weight", _OUR_ATTN + "o_proj/kernel", "D (H K) -> H K D", "mha"),
    # Multi-head latent attention (Small, base).
    (_ATTN + "q_proj.weight", _OUR_ATTN + "q_proj/kernel", "(H NR) D -> D H NR", "mla full_q"),
    (_ATTN + "q_a_proj.weight", _OUR_ATTN + "q_a_proj/kernel", "Q D -> D Q", "mla lora_q"),
    (_ATTN + "q_a_proj.bias", _OUR_ATTN + "q_a_proj/bias", "Q -> Q", "mla lora_q bias"),
    (_ATTN + "q_a_layernorm.weight", _OUR_ATTN + "q_a_norm/scale", "Q -> Q", "mla lora_q"),
    (_ATTN + "q_b_proj.weight", _OUR_ATTN + "q_b_proj/kernel", "(H NR) Q -> Q H NR", "mla lora_q"),
    (_ATTN + "kv_a_proj_with_mqa.weight", _OUR_ATTN + "kv_a_proj/kernel", "CR D -> D CR", "mla"),
    (_ATTN + "kv_a_proj_with_mqa.bias", _OUR_ATTN + "kv_a_proj/bias", "CR -> CR", "mla bias"),
    (_ATTN + "kv_a_layernorm.weight", _OUR_ATTN + "kv_a_norm/scale", "C -> C", "mla"),
    (_ATTN + "kv_b_proj.weight", _OUR_ATTN + "kv_b_proj/kernel", "(H NV) C -> C H NV", "mla"),
    (_ATTN + "o_proj.weight", _OUR_ATTN + "o_proj/kernel", "D (H V) -> H V D", "mla"),
    (_ATTN + "o_proj.bias", _OUR_ATTN + "o_proj/bias", "D -> D", "bias"),
    (_LAYER + "post_attention_layernorm.weight", _RUN + "post_attention_layernorm/scale",
     "D -> D"),
    # Dense layers.
    (_LAYER + "mlp.gate_proj.weight", _RUN + "mlp/gate_proj/kernel", "F D -> D F", "dense"),
    (_LAYER + "mlp.up_proj.weight", _RUN + "mlp/up_proj/kernel", "F D -> D F", "dense"),
    (_LAYER + "mlp.down_proj.weight", _RUN + "mlp/down_proj/kernel", "D F -> F D", "dense"),
    # Mixture of experts.
    (_LAYER + "mlp.gate.weight", _RUN + "mlp/gate/kernel", "E D -> D E", "moe"),
    (_LAYER + "mlp.gate.e_score_correction_bias",
     "router/decoder/{run}/mlp/gate/e_score_correction_bias", "E -> E", "moe noaux_tc"),
    (_LAYER + "mlp.experts.{expert}.gate_proj.weight", _RUN + "mlp/experts/gate_proj",
     "M D -> D M", "moe"),
    (_LAYER + "mlp.experts.{expert}.up_proj.weight", _RUN + "mlp/experts/up_proj",
     "M D -> D M", "moe"),
    (_LAYER + "mlp.experts.{expert}.down_proj.weight", _RUN + "mlp/experts/down_proj",
     "D M -> M D", "moe"),
    (_LAYER + "mlp.shared_experts.gate_proj.weight", _RUN + "mlp/shared_experts/gate_proj/kernel",
     "S D -> D S", "moe shared"),
    (_LAYER + "mlp.shared_experts.up_proj.weight", _RUN + "mlp/shared_experts/up_proj/kernel",
     "S D -> D S", "moe shared"),
    (_LAYER + "mlp.shared_experts.down_proj.weight", _RUN + "mlp/shared_experts/down_proj/kernel",
     "D S -> S D", "moe shared"),

    ("language.model.norm.weight", "params/decoder/norm/scale", "D -> D"),
    ("language.lm_head.weight", "params/decoder/lm_head/kernel", "vocab D -> D vocab"),
)))
# fmt: on


@dataclasses.dataclass(frozen=True)
class Entry:
    """An original tensor and its destination.

    Attributes:
      hf: name of the original tensor.
      path: path of the parameter; None if the tensor is dropped.
      index: index in the leading axes of the stacked parameter: layer, expert.
      axes: both shapes and the conversion.
      row: row of the table.
    """

    hf: str
    path: str | None
    index: tuple[int, ...]
    axes: Axes
    row: Row


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter of the model.

    Attributes:
      path: path of the parameter.
      shape: its shape, including the axes of the stack.
      entries: the original tensors that are stacked, in order.
    """

    path: str
    shape: tuple[int, ...]
    entries: tuple[Entry, ...]

    @property
    def is_router_state(self) -> bool:
        """Whether it is router state without gradient, which is always float32."""
        return self.path.startswith("router/")


def expand(config: VL2Config) -> list[Entry]:
    """Expands the table for a model.

    Returns:
      An entry for each tensor of the original checkpoint, in its order.
    """
    vision, decoder = _vision_sizes(config), _decoder_sizes(config)
    entries: list[Entry] = []
    for is_stack, rows in _sections():
        if not is_stack:
            for row in rows:
                sizes = vision if row.hf.startswith("vision.") else decoder
                entries.append(Entry(row.hf, row.path, (), sized(row.axes, sizes), row))
        elif rows[0].hf.startswith("projector."):
            entries += _adaptor(config, rows)
        elif rows[0].hf.startswith("vision."):
            for layer in range(config.vision.layers):
                entries += _layer(rows, vision, layer, layer, "", frozenset(), 0)
        else:
            for run in config.decoder.layer_runs:
                flags = _flags(config, run.is_moe)
                for i in range(run.count):
                    experts = config.decoder.n_routed_experts or 0
                    entries += _layer(rows, decoder, run.first + i, i, run.name, flags, experts)
    return entries


def leaves(entries: list[Entry]) -> dict[str, Leaf]:
    """Groups entries by parameter; dropped tensors are left out.

    Args:
      entries: entries from `expand`.

    Returns:
      The parameters by path: {"params/decoder/moe_1/mlp/experts/gate_proj": Leaf, ...}.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.path is not None:
            groups.setdefault(entry.path, []).append(entry)
    found = {}
    for path, group in groups.items():
        last = group[-1]  # indices are dense and in order
        stack = tuple(i + 1 for i in last.index)
        found[path] = Leaf(path, stack + last.axes.shape, tuple(group))
    return found


def target_shapes(config: VL2Config) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all parameters: `{"params/...": (..), "router/...": (..)}`."""
    return {path: leaf.shape for path, leaf in leaves(expand(config)).items()}


def _sections() -> Iterator[tuple[bool, list[Row]]]:
    """Groups consecutive rows; those of a stacked group are repeated together for each layer."""

    def section(row: Row) -> tuple[bool, str]:
        stacked = "{" in row.hf
        return stacked, row.hf.split(".")[0] if stacked else ""

    for (stacked, _), rows in itertools.groupby(TABLE, section):
        yield stacked, list(rows)


def _layer(rows, sizes, layer: int, position: int, run: str, flags, experts: int) -> list[Entry]:
    """Entries of a layer; `position` is its index in the stack."""
    found = []
    for row in rows:
        if not flags.issuperset(row.when.split()):
            continue
        axes = sized(row.axes, sizes)
        path = row.path.format(run=run)
        for expert in range(experts) if "{expert}" in row.hf else (None,):
            index = (position,) if expert is None else (position, expert)
            name = row.hf.format(layer=layer, expert=expert)
            found.append(Entry(name, path, index, axes, row))
    return found


def _adaptor(config: VL2Config, rows) -> list[Entry]:
    """Entries of the adaptor's linear layers, which have different sizes and are not stacked."""
    found = []
    for i, (inputs, outputs) in enumerate(config.adaptor.layer_sizes):
        for row in rows:
            axes = sized(row.axes, {"in": inputs, "out": outputs})
            found.append(Entry(row.hf.format(twice=2 * i), row.path.format(layer=i), (), axes, row))
    return found


def _flags(config: VL2Config, is_moe: bool) -> frozenset[str]:
    """Properties of a layer, as in the column `when`."""
    decoder = config.decoder
    words = {
        "moe" if is_moe else "dense",
        "mla" if decoder.use_mla else "mha",
        "full_q" if decoder.q_lora_rank is None else "lora_q",
    }
    words |= {"bias"} if decoder.attention_bias else set()
    words |= {"shared"} if decoder.n_shared_experts else set()
    words |= {"noaux_tc"} if decoder.topk_method == "noaux_tc" else set()
    return frozenset(words)


def _vision_sizes(config: VL2Config) -> dict[str, int]:
    vision = config.vision
    return {
        "W": vision.width,
        "H": vision.heads,
        "K": vision.head_dim,
        "F": vision.intermediate_size,
        "P": vision.grid**2,
        "p": vision.patch_size,
        "q": vision.patch_size,
    }


def _decoder_sizes(config: VL2Config) -> dict[str, int]:
    decoder = config.decoder
    kv_rank = decoder.kv_lora_rank or 0
    return {
        "D": decoder.hidden_size,
        "H": decoder.num_attention_heads,
        "K": decoder.hidden_size // decoder.num_attention_heads,
        "NR": decoder.qk_nope_head_dim + decoder.qk_rope_head_dim,
        "NV": decoder.qk_nope_head_dim + decoder.v_head_dim,
        "V": decoder.v_head_dim,
        "C": kv_rank,
        "CR": kv_rank + decoder.qk_rope_head_dim,
        "Q": decoder.q_lora_rank or 0,
        "F": decoder.intermediate_size,
        "M": decoder.moe_intermediate_size,
        "S": decoder.moe_intermediate_size * (decoder.n_shared_experts or 0),
        "E": decoder.n_routed_experts or 0,
        "vocab": decoder.vocab_size,
    }
