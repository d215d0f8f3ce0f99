"""Philox 4x32-10 against the known answers that its authors publish (Random123, kat_vectors)."""

import pytest

from sslfast import _C

KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert tuple(_C.philox4x32(counter, key)) == expected


def test_wrong_lengths_are_named():
    with pytest.raises(ValueError, match="4 words of counter"):
        _C.philox4x32([0, 0, 0], [0, 0])
