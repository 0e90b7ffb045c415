"""Tuples as byte strings that sort like the tuples: the key order of every embedded store.

The rules:

- A part is an `int` of 64 signed bits, `bytes` or `str`. Across types: every int < every byte string < every text.
- Ints sort by value, byte strings bytewise, texts by code point (which is the bytewise order of their UTF-8).
- A tuple sorts before every longer tuple that begins with it.
- Each tuple has exactly one packed form, so equality of keys is equality of bytes.

The form: each part is a tag byte followed by a body.

    0x10  8 bytes   a negative int, plus 2**63
    0x11  1 byte    0 .. 255                          0x20  body 0x00   bytes, each 0x00 inside written 0x00 0xFF
    0x12  2 bytes   256 .. 65535                      0x30  body 0x00   text, in UTF-8, escaped the same way
    0x13  4 bytes   65536 .. 2**32 - 1
    0x14  8 bytes   2**32 .. 2**63 - 1

Why it sorts: bodies of ints have a fixed width under their tag, and wider tags are greater. A body of bytes ends in
0x00, and what follows that (nothing, or a tag below 0xFF) is less than the 0xFF of an escaped 0x00; so `b"a"` stays
before `b"a\\0"` whatever comes next. Small ints are two bytes because partitions, kinds and positions are small and a
key is written twice: to the log and to the tree.

What we dislike about it: 0x00 bytes cost double, which random digests pay (one part in 256) and nothing else does.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Final

from sagaloom.ports.keyvalue import Key, KeyPart, Slot

__all__ = ["INT_MAX", "INT_MIN", "PackedPart", "pack", "prefix_range", "table_of", "unpack"]

PackedPart = int | bytes | str

INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**63 - 1

_NEGATIVE: Final = 0x10
_ONE_BYTE: Final = 0x11
_TWO_BYTES: Final = 0x12
_FOUR_BYTES: Final = 0x13
_EIGHT_BYTES: Final = 0x14
_BYTES: Final = 0x20
_TEXT: Final = 0x30
_ABOVE_EVERY_TAG: Final = b"\xff"

_TABLE_NAME: Final = re.compile("[a-z_]+")

# Names of sagas, kinds and hot correlation keys come again and again, and so do the numbers of instances; a hit costs
# a third of encoding anew.
_TEXTS: Final[dict[str, bytes]] = {}
_INTS: Final[dict[int, bytes]] = {}
_CACHED_MAX: Final = 4096
_CACHED_TEXT_CHARS_MAX: Final = 64

_SMALL: Final = tuple(bytes((_ONE_BYTE, n)) for n in range(256))
_pack_two = struct.Struct(">BH").pack
_pack_four = struct.Struct(">BI").pack
_pack_eight = struct.Struct(">BQ").pack
_read_two = struct.Struct(">H").unpack_from
_read_four = struct.Struct(">I").unpack_from
_read_eight = struct.Struct(">Q").unpack_from


def pack(parts: tuple[KeyPart, ...], bases: Mapping[str, int] | None = None) -> bytes:
    """The byte string that sorts as `parts` does.

    A `Slot` becomes the int `bases[slot.counter] + slot.offset`. Raises `TypeError` for a part of another type
    (`bool` included: it would come back as an int) and `ValueError` for an int beyond 64 signed bits or a slot whose
    counter was not reserved.

    >>> pack(("eu", 7)) < pack(("eu", 300)) < pack(("eu", "")) < pack(("us",))
    True
    """
    # The exact types come first and inline: this runs for every part of every row of every commit, and a function
    # call per part would cost as much as the packing.
    packed = b""
    for part in parts:
        if type(part) is int:
            packed += _INTS.get(part) or _pack_int(part)
        elif type(part) is str:
            packed += _TEXTS.get(part) or _pack_text(part)
        elif type(part) is bytes:
            packed += b" %b\0" % (part.replace(b"\0", b"\0\xff") if 0 in part else part)
        elif type(part) is Slot and bases is not None and part[0] in bases:
            packed += _pack_new_int(bases[part[0]] + part[1])
        else:
            packed += _pack_other(part, bases)
    return packed


def unpack(packed: bytes) -> tuple[PackedPart, ...]:
    """The tuple that `pack` made `packed` of. Raises `ValueError` for bytes that are no packed tuple.

    >>> unpack(pack(("eu", -1, b"x")))
    ('eu', -1, b'x')
    """
    parts: list[PackedPart] = []
    at = 0
    end = len(packed)
    try:
        while at < end:
            tag = packed[at]
            at += 1
            if tag in (_TEXT, _BYTES):
                start = at
                at = packed.index(0, start) + 1
                if at < end and packed[at] == 0xFF:
                    while at < end and packed[at] == 0xFF:
                        at = packed.index(0, at + 1) + 1
                    body = packed[start : at - 1].replace(b"\0\xff", b"\0")
                else:
                    body = packed[start : at - 1]
                parts.append(body if tag == _BYTES else _text_of(body))
            elif tag == _ONE_BYTE:
                parts.append(packed[at])
                at += 1
            elif tag == _FOUR_BYTES:
                parts.append(_read_four(packed, at)[0])
                at += 4
            elif tag == _EIGHT_BYTES:
                number = _read_eight(packed, at)[0]
                if number > INT_MAX:
                    raise ValueError(f"{number} is no int of 64 bits with sign")
                parts.append(number)
                at += 8
            elif tag == _TWO_BYTES:
                parts.append(_read_two(packed, at)[0])
                at += 2
            elif tag == _NEGATIVE:
                parts.append(_read_eight(packed, at)[0] - 2**63)
                at += 8
            else:
                raise ValueError(f"unknown tag 0x{tag:02x}")
    except (ValueError, IndexError, struct.error) as cause:
        raise ValueError(f"not a packed key, at byte {at} of {packed[:80].hex()}: {cause}") from cause
    return tuple(parts)


def prefix_range(prefix: tuple[KeyPart, ...]) -> tuple[bytes, bytes]:
    """Bounds (both exclusive) of the packed forms of all tuples that are longer than `prefix` and begin with it.

    >>> low, high = prefix_range(("eu",))
    >>> low < pack(("eu", 1)) < high, low < pack(("eu",)) < high, low < pack(("eu\\0", 1)) < high
    (True, False, False)
    """
    low = pack(prefix)
    return low, low + _ABOVE_EVERY_TAG


def table_of(key: Key) -> str:
    """The table that `key` belongs to: its first part. Raises `ValueError` for a name outside `[a-z_]+`, because the
    name becomes part of the statements and file names of stores."""
    table = key[0] if key else None
    if type(table) is not str or _TABLE_NAME.fullmatch(table) is None:
        raise ValueError(f"{key!r} names no table: the first part of a key is a text of a-z and _")
    return table


def _pack_int(number: int) -> bytes:
    packed = _pack_new_int(number)
    if len(_INTS) >= _CACHED_MAX:
        _INTS.clear()
    _INTS[number] = packed
    return packed


def _pack_new_int(number: int) -> bytes:
    if 65536 <= number <= 0xFFFFFFFF:
        return _pack_four(_FOUR_BYTES, number)
    if 0 <= number < 256:
        return _SMALL[number]
    if 256 <= number < 65536:
        return _pack_two(_TWO_BYTES, number)
    if INT_MIN <= number < 0:
        return _pack_eight(_NEGATIVE, number + 2**63)
    if number > INT_MAX or number < INT_MIN:
        raise ValueError(f"{number} does not fit a key: ints have 64 bits with sign")
    return _pack_eight(_EIGHT_BYTES, number)


def _pack_text(text: str) -> bytes:
    try:
        body = text.encode()
    except UnicodeEncodeError:
        # Lone surrogates are legal in a Python str (and in JSON escapes); they sort by code point like the rest.
        body = text.encode("utf-8", "surrogatepass")
    packed = b"0%b\0" % (body.replace(b"\0", b"\0\xff") if 0 in body else body)
    if len(text) <= _CACHED_TEXT_CHARS_MAX:
        if len(_TEXTS) >= _CACHED_MAX:
            _TEXTS.clear()
        _TEXTS[text] = packed
    return packed


def _text_of(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        return body.decode("utf-8", "surrogatepass")


def _pack_other(part: object, bases: Mapping[str, int] | None) -> bytes:
    if isinstance(part, Slot):
        raise ValueError(f"{part} needs a number that was not reserved: name {part.counter!r} in `reserve`")
    if isinstance(part, bool):
        raise TypeError(f"{part} cannot be part of a key: write it as 0 or 1")
    if isinstance(part, int):
        return _pack_int(int(part))
    if isinstance(part, str):
        return _pack_text(str.__str__(part))
    if isinstance(part, bytes):
        return pack((bytes(part),))
    raise TypeError(f"{part!r} cannot be part of a key: parts are int, bytes or str")
