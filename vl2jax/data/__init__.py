"""Training data: reads files of several formats, tokenizes their rows, and packs them into batches.

All stages before packing have random access, so that a run resumes exactly.  Imports `common` and
`processing`.  Start with `formats.py` for the formats and `pipeline.py` for the stages; `row.py`
has the record that every format is converted to.
"""
