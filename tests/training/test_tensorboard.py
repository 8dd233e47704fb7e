"""Event files: checksums against published vectors, contents with an independent reader."""

import struct

import pytest

from vl2jax.training.tensorboard import EventWriter, append_whole, crc32c, record


def masked(data: bytes) -> int:
    """The masked checksum of a record, computed bit by bit from its definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return (crc // 2**15 + crc * 2**17 % 2**32 + 0xA282EAD8) % 2**32


def records(data: bytes) -> list[bytes]:
    """Decodes records and checks both checksums."""
    found = []
    while data:
        length, sum_of_length = struct.unpack_from("<QI", data)
        body = data[12 : 12 + length]
        assert sum_of_length == masked(data[:8])
        assert struct.unpack_from("<I", data, 12 + length) == (masked(body),)
        found.append(body)
        data = data[16 + length :]
    return found


def fields(data: bytes) -> list[tuple[int, object]]:
    """Decodes a protobuf message to (number, value), in order."""
    place, found = 0, []

    def varint() -> int:
        nonlocal place
        value, shift = 0, 0
        while True:
            byte = data[place]
            value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
            if byte < 128:
                return value

    while place < len(data):
        number, wire = divmod(varint(), 8)
        size = {1: 8, 5: 4}.get(wire)
        if wire == 0:
            value = varint()
        elif wire == 2:
            size = varint()
            value, place = data[place : place + size], place + size
        else:
            (value,) = struct.unpack_from("<d" if size == 8 else "<f", data, place)
            place += size
        found.append((number, value))
    return found


def summary(event: bytes) -> tuple[int, dict[str, float]]:
    parts = dict(fields(event))
    values = [dict(fields(value)) for number, value in fields(parts[5]) if number == 1]
    return parts[2], {value[1].decode(): value[2] for value in values}


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"", 0),
    ],
)
def test_published_checksums(data, crc):
    assert crc32c(data) == crc


def test_record_frame():
    framed = record(b"abc")
    assert framed[:8] == b"\x03" + bytes(7) and framed[12:15] == b"abc" and len(framed) == 19
    assert records(framed + record(b"")) == [b"abc", b""]


def test_events(tmp_path):
    writer = EventWriter(tmp_path / "run")
    writer.scalars(1, {"train/loss": 2.5, "moe/max_violation/0": -0.25})
    writer.scalars(300_000, {"train/loss": float("nan"), "train/lr": 1e39, "größe": 1})
    writer.scalars(300_001, {"train/loss": float("inf")})  # no finite value
    writer.flush()
    writer.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [writer.path.name]
    assert writer.path.name.startswith("events.out.tfevents.")
    version, start, *rest = records(writer.path.read_bytes())
    assert dict(fields(version))[3] == b"brain.Event:2"
    assert dict(fields(version))[1] > 1.6e9
    assert dict(fields(start))[2] == 0
    assert [summary(event) for event in rest] == [
        (1, {"train/loss": 2.5, "moe/max_violation/0": -0.25}),
        (300_000, {"größe": 1.0}),
    ]


def test_resumed_run_says_where(tmp_path):
    first, second = EventWriter(tmp_path), EventWriter(tmp_path, first_step=501)
    first.close()
    second.close()
    assert first.path != second.path
    start = dict(fields(records(second.path.read_bytes())[1]))
    assert start[2] == 501 and fields(start[7]) == [(1, 1)]


class Full:
    """A file on a disk with space for `room` bytes."""

    name = "full"

    def __init__(self, room: int):
        self.data, self.room = b"", room

    def seek(self, offset, whence):
        return len(self.data) + offset

    def write(self, data: bytes) -> int:
        kept = data[: self.room - len(self.data)]
        self.data += kept
        return len(kept)

    def truncate(self, size: int) -> None:
        self.data = self.data[:size]


def test_full_disk_leaves_whole_records():
    file = Full(8)
    append_whole(file, b"first")
    with pytest.raises(OSError, match="No space left"):
        append_whole(file, b"second")
    assert file.data == b"first"
    append_whole(file, b"2nd")
    assert file.data == b"first2nd"
