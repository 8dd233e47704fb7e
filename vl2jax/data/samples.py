"""A `Row` becomes a `Sample`: the one place where training data is tokenised and decoded."""

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
            return processor.sample_prompt(row.text, row.images, inference=False)
        return processor.sample(row.messages, row.images, inference=False, mask_prompt=mask_prompt)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
