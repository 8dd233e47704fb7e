"""Names of intermediate results, by which a rematerialisation policy keeps them."""

PRODUCT = "product"  # results of products inside attention and experts
EXCHANGED = "exchanged"  # rows that an exchange among experts has brought
