"""Training data: files of many formats become rows, rows become samples, samples packed batches.

Everything before packing has random access, so that a run resumes exactly.  Imports `common` and
`processing`.  Start with `formats.py` for what is read, `pipeline.py` for the order of
it all; `row.py` is the one form that every file is read into.
"""
