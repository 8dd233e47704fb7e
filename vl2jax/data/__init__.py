"""Training data: files of many formats, packed into batches."""
