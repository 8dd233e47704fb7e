"""A `Row` becomes a `Sample`: the one place where training data is tokenised and decoded."""

import dataclasses

from vl2jax.common.errors import UserError
from vl2jax.data.row import Row
from vl2jax.processing.collate import Sample
from vl2jax.processing.processor import Processor


def read_sample(row: Row, processor: Processor, *, mask_prompt: bool | None = None) -> Sample:
    """Tokenises a row and decodes its pictures.

    Args:
      mask_prompt: whether questions are no targets; None as the processor's settings say.  Of a
        document all text is a target.

    Raises:
      UserError: the row does not fit the model, or a picture is damaged; begins with `row.where`.
    """
    try:
        if row.text is not None:
            sample = processor.sample_prompt(row.text, row.images, inference=False)
        else:
            options = {"inference": False, "mask_prompt": mask_prompt}
            sample = processor.sample(row.messages, row.images, **options)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    return dataclasses.replace(sample, image_sources=())  # whose bytes may be in memory
