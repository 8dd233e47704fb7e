"""Names for `checkpoint_name`, by which rematerialisation policies choose what to save."""

PRODUCT = "product"  # results of matrix products inside attention and experts
EXCHANGED = "exchanged"  # rows received in an expert exchange
