"""Makes a `Sample` of a `Row`: all training data is tokenized and decoded here."""

import dataclasses

from vl2jax.common.errors import UserError
from vl2jax.data.row import Row
from vl2jax.processing.collate import Sample
from vl2jax.processing.processor import Processor


def read_sample(row: Row, processor: Processor, *, mask_prompt: bool | None = None) -> Sample:
    """Tokenizes a row and decodes its images.

    Args:
      row: a conversation or a document; all text of a document is a target.
      processor: the processor.
      mask_prompt: whether only answers are targets; None: the processor's setting.

    Raises:
      UserError: the row does not fit the model, or an image cannot be loaded; the message begins
        with `row.where`.
    """
    try:
        if row.text is not None:
            sample = processor.sample_prompt(row.text, row.images, inference=False)
        else:
            options = {"inference": False, "mask_prompt": mask_prompt}
            sample = processor.sample(row.messages, row.images, **options)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    return dataclasses.replace(sample, image_sources=())  # frees images that are bytes in memory
