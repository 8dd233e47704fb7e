"""Writes TensorBoard event files of scalars, without TensorFlow.

A file is a sequence of records: length (8 bytes), checksum of the length, data, checksum of the
data.  The data is an `Event` protobuf.  Only the fields that scalars need are encoded:

    Event       1 wall_time double   2 step int64   3 file_version string
                5 summary            7 session_log
    Summary     1 value, repeated:   1 tag string   2 simple_value float
    SessionLog  1 status: 1 = START
"""

import errno
import io
import itertools
import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types
_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected
_serial = itertools.count()  # makes the names of files of the same second unique


def _crc_table() -> tuple[int, ...]:
    """The CRC-32C lookup table, with one entry per byte value."""
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """Computes the CRC-32C (Castagnoli) checksum."""
    crc, table = 0xFFFFFFFF, _TABLE
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def record(data: bytes) -> bytes:
    """Encodes data as one record of a TFRecord file."""
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def append_whole(file: io.FileIO, data: bytes) -> None:
    """Appends data to a file; if that fails, restores the previous length.

    Args:
      file: file opened for appending, without buffer.
      data: bytes to append.

    Raises:
      OSError: not all of the data could be written, for example because the disk is full.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
    except OSError:
        file.truncate(end)
        raise


class EventWriter:
    """Writes scalars to a new event file, without buffering.

    Attributes:
      path: path of the file.
    """

    def __init__(self, directory: Path | str, first_step: int = 0):
        """
        Args:
          directory: directory of the file, created if it does not exist.  TensorBoard reads all
            event files in a directory as one run.
          first_step: first step that will be written; TensorBoard ignores this and later steps in
            older files.

        Raises:
          OSError: the file cannot be written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{next(_serial)}"
        self.path = directory / f"events.out.tfevents.{name}"
        self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115, closed by `close`
        version = _field(3, _BYTES, b"brain.Event:2")
        start = _field(2, _VARINT, first_step) + _field(7, _BYTES, _field(1, _VARINT, 1))
        append_whole(self._file, record(_wall_time(now) + version))
        append_whole(self._file, record(_wall_time(now) + start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step; values that are not finite are omitted.

        Args:
          step: number of the training step.
          values: values by tag.

        Raises:
          OSError: the values could not be written; the file is unchanged.
        """
        summary = b"".join(
            _field(1, _BYTES, _field(1, _BYTES, tag.encode()) + _field(2, _FLOAT, value))
            for tag, value in values.items()
            if _fits(value)
        )
        if summary:
            event = _wall_time(time.time()) + _field(2, _VARINT, step) + _field(5, _BYTES, summary)
            append_whole(self._file, record(event))

    def flush(self) -> None:
        """Waits until everything is on disk (fsync)."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _masked_crc(data: bytes) -> bytes:
    """The masked checksum of the TFRecord format: CRC-32C, rotated, plus a constant."""
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _wall_time(seconds: float) -> bytes:
    return _field(1, _DOUBLE, seconds)


def _fits(value: float) -> bool:
    """Whether a value is finite as float32."""
    return math.isfinite(value) and abs(value) <= 3.4028234e38


def _field(number: int, wire: int, value) -> bytes:
    """Encodes a field of a protobuf message: the key, then the value."""
    key = _varint(number << 3 | wire)
    if wire == _VARINT:
        return key + _varint(value)
    if wire == _BYTES:
        return key + _varint(len(value)) + value
    return key + struct.pack("<d" if wire == _DOUBLE else "<f", value)


def _varint(value: int) -> bytes:
    """Encodes a non-negative integer as a protobuf varint: seven bits per byte, low bits first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
