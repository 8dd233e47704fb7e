"""Makes a `Sample` of a `Row`: all training data is tokenized and decoded here."""

import dataclasses
from typing import Any

from vl2jax.common.errors import UserError
from vl2jax.data.row import Row
from vl2jax.processing.collate import Sample
from vl2jax.processing.limits import Limits, TooLong
from vl2jax.processing.processor import Processor


def read_sample(
    row: Row,
    processor: Processor,
    *,
    mask_prompt: bool | None = None,
    limits: Limits | None = None,
) -> Sample:
    """Tokenizes a row and decodes its images.

    Args:
      row: a conversation or a document; all text of a document is a target.
      processor: the processor.
      mask_prompt: whether only answers are targets; None: the processor's setting.
      limits: room for the sample; None: that of the model.

    Raises:
      UserError: the row does not fit the model, or an image cannot be loaded; the message begins
        with `row.where`.  `TooLong` if the sample has no room.
    """
    try:
        if row.text is not None:
            sample = processor.sample_prompt(row.text, row.images, inference=False, limits=limits)
        else:
            options: Any = {"inference": False, "mask_prompt": mask_prompt, "limits": limits}
            sample = processor.sample(row.messages, row.images, **options)
    except UserError as error:
        kind = TooLong if isinstance(error, TooLong) else UserError
        raise kind(f"{row.where}: {error}") from error
    return dataclasses.replace(sample, image_sources=())  # frees images that are bytes in memory
