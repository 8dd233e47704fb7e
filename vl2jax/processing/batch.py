"""The one record that crosses from host to device.

Axis legend: B rows, T tokens, I tile slots, S pixels per tile side, Q projected tokens per tile.
"""

from typing import Any

import flax.struct

# Rows of the table that `Batch.image_index` points into (see `model.py`).  The two learned vectors
# come first, so that padding the tile slots moves no index.
TEXT = -1
IMAGE_NEWLINE = 0
VIEW_SEPERATOR = 1  # spelled as in the checkpoints
FIRST_TILE_ROW = 2

# np.ndarray on the host, jax.Array on devices, a shape or a sharding where a program is planned.
Field = Any


@flax.struct.dataclass
class Batch:
    """Conversations as integers, pictures as bytes; rows are padded on the right.

    Attributes:
      tiles: uint8[I, S, S, 3]. Tiles of all rows, in order; surplus slots are zero. I may be 0.
      tokens: int32[B, T]. Visual positions hold the `<image>` id, padding holds the pad id.
      image_index: int32[B, T]. `TEXT` for a text token, else a row of the table
        [image_newline; view_seperator; tile 0 row 0..Q-1; tile 1 ...].
      positions: int32[B, T]. Position of each token in its own sequence, from 0.
      segment_ids: int32[B, T]. 0 for padding, else the number (from 1) of the sequence within
        the row: tokens see only their own sequence.
      loss_mask: bool[B, T]. True where the token is a supervised target.
    """

    tiles: Field
    tokens: Field
    image_index: Field
    positions: Field
    segment_ids: Field
    loss_mask: Field
