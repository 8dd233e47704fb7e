"""`Batch`: the record that the host sends to the device.

Axis legend: B rows, T tokens, I tile slots, S pixels per tile side, Q visual tokens per tile.
"""

from typing import Any

import flax.struct

# Values of `Batch.image_index`: indices into the table of visual embeddings, which `model/vl2.py`
# builds.  The two learned vectors come first, so that padding tile slots does not move an index.
TEXT = -1
IMAGE_NEWLINE = 0
VIEW_SEPERATOR = 1  # spelled as in the checkpoints
FIRST_TILE_ROW = 2

# np.ndarray on the host, jax.Array on devices, a shape or sharding when a program is planned.
Field = Any


@flax.struct.dataclass
class Batch:
    """Token ids and image tiles of several sequences; rows are padded on the right.

    Attributes:
      tiles: uint8[I, S, S, 3], the tiles of all rows, in order; unused slots are zero.  I may be 0.
      tokens: int32[B, T]; visual positions have the `<image>` id, padding the pad id.
      image_index: int32[B, T]; `TEXT` for a text token, else an index into the table
        [image_newline; view_seperator; tile 0 row 0..Q-1; tile 1 ...].
      positions: int32[B, T], the position of each token in its own sequence, from 0.
      segment_ids: int32[B, T]; 0 for padding, else the number of the sequence within the row, from
        1.  Tokens attend only to their own sequence.
      loss_mask: bool[B, T]; True for tokens that are targets of the loss.
    """

    tiles: Field
    tokens: Field
    image_index: Field
    positions: Field
    segment_ids: Field
    loss_mask: Field
