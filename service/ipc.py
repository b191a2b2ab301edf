"""What an Arrow body would take in memory, read from its headers before anything is decompressed.

An Arrow IPC stream is a sequence of messages; a record batch's header lists its buffers, and each compressed buffer
begins with the size it has when decompressed. Arrow allocates exactly that and fails if it does not fit, so the sum is
a bound. Source: the Arrow columnar format, "IPC Streaming Format" and `Message.fbs`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import pyarrow as pa

from service.errors import Invalid

MAX_SCHEMA_BYTES: Final = 64 * 2**10
"""Longest schema header that is read; the widest table of ours takes 8 KiB."""

MESSAGE_BYTES: Final = 16 * 2**10
"""What the objects around one record batch take, however few rows it has."""


def decoded_bytes(body: bytes) -> int:
    """Bytes of memory that the tables of a body take when they are decoded.

    Raises:
        Invalid: the body is not a sequence of Arrow IPC streams, or holds what no table of ours does.
    """
    total = 0
    source = pa.BufferReader(body)
    while source.tell() < len(body):
        try:
            for message in pa.ipc.MessageReader.open_stream(source):
                total += _message_bytes(message)
        except (pa.ArrowException, OSError, struct.error, IndexError) as error:
            first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise Invalid(f"the body is not a sequence of Arrow IPC streams: {first}") from error
    return total


def _message_bytes(message: pa.ipc.Message) -> int:
    if message.type == "schema":
        if message.metadata.size > MAX_SCHEMA_BYTES:
            raise Invalid(f"an Arrow schema may take {MAX_SCHEMA_BYTES} bytes, got {message.metadata.size}")
        return 0
    if message.type != "record batch":
        raise Invalid(f"the tables have no columns that need an Arrow message of type {message.type!r}")
    header, data = memoryview(message.metadata), memoryview(message.body)
    total = MESSAGE_BYTES
    for offset, length in _buffers(header):
        size = length
        if length >= 8 and 0 <= offset <= len(data) - 8:
            (declared,) = struct.unpack_from("<q", data, offset)
            # Without compression these 8 bytes are data: counting them as a size could only refuse honest bodies.
            size = max(length, declared) if _is_compressed(header) else length
        total += size
    return total


# A flatbuffer's table: an offset to its vtable, which says where each field stands (0: absent).


def _root(header: memoryview) -> int:
    return int(struct.unpack_from("<I", header, 0)[0])


def _field(header: memoryview, table: int, number: int) -> int:
    """Where a field of a table stands; 0 where it is absent."""
    vtable = table - struct.unpack_from("<i", header, table)[0]
    size = struct.unpack_from("<H", header, vtable)[0]
    entry = 4 + 2 * number
    offset = struct.unpack_from("<H", header, vtable + entry)[0] if entry < size else 0
    return table + offset if offset else 0


def _follow(header: memoryview, at: int) -> int:
    return int(at + struct.unpack_from("<I", header, at)[0])


def _record_batch(header: memoryview) -> int:
    return _follow(header, _field(header, _root(header), 2))  # Message.header


def _is_compressed(header: memoryview) -> bool:
    return bool(_field(header, _record_batch(header), 3))  # RecordBatch.compression


def _buffers(header: memoryview) -> Iterator[tuple[int, int]]:
    """(offset, length) of each buffer in the message's body."""
    at = _field(header, _record_batch(header), 2)  # RecordBatch.buffers
    if not at:
        return
    vector = _follow(header, at)
    (count,) = struct.unpack_from("<I", header, vector)
    for index in range(count):
        yield struct.unpack_from("<qq", header, vector + 4 + 16 * index)
