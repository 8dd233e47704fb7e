"""Fuzz target: parquet files are read, or refused in one short line."""

import pytest
from fuzz_case import fuzz, mutated

from vl2jax.common.errors import UserError
from vl2jax.data.files import open_source

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def files(folder):
    """Small whole files, with nested columns, several groups and compressions."""
    turns = [{"role": "user", "content": "see"}, {"role": "assistant", "content": "no"}]
    rows = [
        {"messages": turns, "images": [{"bytes": b"x" * 40, "path": None}], "id": n}
        for n in range(4)
    ]
    texts = [{"text": "see no 图片" * n or None} for n in range(9)]
    found = []
    for table in (rows, texts):
        for compression in ("NONE", "SNAPPY", "ZSTD", "GZIP"):
            path = folder / "whole.parquet"
            options = {"row_group_size": 3, "compression": compression}
            parquet.write_table(pyarrow.Table.from_pylist(table), path, **options)
            found.append(path.read_bytes())
    return found


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"

    def read(content):
        path.write_bytes(content)
        rows, failure = open_source(path), None
        for index in (*range(min(len(rows), 12)), len(rows) - 1):
            try:
                rows[index]
            except UserError as error:
                failure = error
        if failure is not None:
            raise failure

    assert fuzz(mutated(files(tmp_path)), read)
