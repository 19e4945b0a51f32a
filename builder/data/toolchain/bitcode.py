"""Compare two modules of LLVM bitcode that were compiled from the same source.

nvcc's front end adds an attribute to each argument of one byte, including `bool`. The attribute states how the argument is
extended to a register: `signext` if char is signed (x86_64), `zeroext` if char is unsigned (aarch64). The value of a bool is 0
or 1, and both attributes extend it to the same value. If the code uses a char as a number, the instructions differ too (sext
and zext). So if two modules differ only in these attributes, the sign of char does not affect the result.

The format: https://llvm.org/docs/BitCodeFormat.html. A block at the beginning of the module contains the attributes. If the
length of this block differs, the offsets of the functions differ too. Readers use these offsets to skip functions.
"""

from __future__ import annotations

from array import array

IDENTIFICATION, MODULE, ATTRIBUTE_GROUPS, SYMBOLS = 13, 8, 10, 14
"Block ids."
SIGNEXT, ZEROEXT = 24, 34
"Attribute kinds (llvm/Bitcode/LLVMBitCodes.h)."
ENTER, UNABBREVIATED = 1, 3
"Abbreviation ids."


class LayoutError(Exception):
    """The bitcode does not have the layout that LLVM 7 and later write."""


class Reader:
    """Reads the bits of a module one after the other."""

    def __init__(self, code: bytes) -> None:
        self.code = code
        self.bit = 0

    def fixed(self, width: int) -> int:
        """Read a number that has `width` bits."""
        first, last = self.bit >> 3, (self.bit + width + 7) >> 3
        if last > len(self.code):
            raise LayoutError
        word = int.from_bytes(self.code[first:last], "little")
        value = (word >> (self.bit & 7)) & ((1 << width) - 1)
        self.bit += width
        return value

    def variable(self, width: int) -> int:
        """Read a number that is stored in chunks of `width` bits.

        The highest bit of a chunk is set if one more chunk follows.
        """
        value = shift = 0
        more = 1 << (width - 1)
        while True:
            chunk = self.fixed(width)
            value |= (chunk & (more - 1)) << shift
            if not chunk & more:
                return value
            shift += width - 1

    def enter(self) -> tuple[int, int, int]:
        """Read the header of a block.

        Returns:
            The id of the block, the width of its abbreviation ids, and the position of the first bit after the block.
        """
        block, width = self.variable(8), self.variable(4)
        self.bit = (self.bit + 31) & ~31
        words = self.fixed(32)
        return block, width, self.bit + 32 * words


def differ_only_in_extension(one: bytes, other: bytes) -> bool:
    """Whether two modules differ at most in the attributes `signext` and `zeroext`."""
    try:
        return _equal(one, other)
    except LayoutError:
        return False


def _equal(one: bytes, other: bytes) -> bool:
    if one == other:
        return True
    (groups, start, end), (other_groups, other_start, other_end) = _groups(one), _groups(other)
    head = slice(_module(one) // 8, start)
    if groups != other_groups or one[head] != other[head] or start != other_start:
        return False
    shift = (end - other_end) // 4
    if len(one) - end != len(other) - other_end or len(one) % 4:
        return False
    return _equal_rest(one, end, other, other_end, shift)


def _module(code: bytes) -> int:
    """The position of the first bit of the module's content. The content begins after the length of the module."""
    reader = Reader(code)
    if reader.fixed(32) != 0xDEC04342:
        raise LayoutError
    while True:
        if reader.fixed(2) != ENTER:
            raise LayoutError
        block, _, end = reader.enter()
        if block == MODULE:
            return reader.bit
        reader.bit = end


def _groups(code: bytes) -> tuple[list[list[int]], int, int]:
    """Read the attribute groups, with `signext` for both extensions.

    Returns:
        The groups, the position of the first byte of their block, and the position of the first byte after the block.
    """
    reader = Reader(code)
    reader.bit = _module(code)
    while True:
        start = reader.bit
        kind = reader.fixed(3)
        if kind == UNABBREVIATED:
            _record(reader)
            continue
        if kind != ENTER:
            raise LayoutError
        block, width, end = reader.enter()
        if block == ATTRIBUTE_GROUPS:
            break
        reader.bit = end
    groups = []
    while (kind := reader.fixed(width)) == UNABBREVIATED:
        groups.append(_with_one_extension(_record(reader)))
    if kind != 0:  # END_BLOCK
        raise LayoutError
    return groups, start // 8, end // 8


def _with_one_extension(group: list[int]) -> list[int]:
    """Replace `zeroext` by `signext` in a group.

    The first three values of a group are its code, its number and its parameter. The attributes follow. The first value of an
    attribute is its form.
    """
    place = 3
    while place < len(group):
        form = group[place]
        if form == 0:  # a kind
            if group[place + 1] == ZEROEXT:
                group[place + 1] = SIGNEXT
            place += 2
        elif form == 1:  # a kind and a number
            place += 3
        elif form in (3, 4):  # one text or two texts; a zero ends each text
            for _ in range(form - 2):
                place = group.index(0, place + 1)
            place += 1
        else:
            raise LayoutError
    return group


def _record(reader: Reader) -> list[int]:
    """Read an unabbreviated record: its code and its values."""
    code = reader.variable(6)
    return [code, *(reader.variable(6) for _ in range(reader.variable(6)))]


def _equal_rest(one: bytes, start: int, other: bytes, other_start: int, shift: int) -> bool:
    """Whether the bytes after the attribute groups are equal, except for offsets that differ by `shift` words.

    Two kinds of offsets may differ. The first differing offset is the offset of a table. The other offsets are in this table;
    they are the offsets of the functions.
    """
    if not shift:
        return one[start:] == other[other_start:]
    words, others = array("I", one[start:]), array("I", other[other_start:])
    different = [number for number in range(len(words)) if words[number] != others[number]]
    if not different:
        return False
    reader, second = Reader(one), Reader(other)
    # The offset of the table has 32 bits. It can begin at any bit, so the loop tries each bit.
    for bit in range(32 * max(different[0] - 1, 0), 32 * (different[0] + 1)):
        reader.bit, second.bit = 8 * start + bit, 8 * other_start + bit
        table, other_table = reader.fixed(32), second.fixed(32)
        if table - other_table == shift and (inside := _table(reader, 32 * table, start)) is not None:
            first, last = bit // 32, (bit + 31) // 32
            return all(number in inside or first <= number <= last for number in different) and _same_around(
                (words[first : last + 1], others[first : last + 1]), bit % 32
            )
    return False


def _table(reader: Reader, bit: int, start: int) -> range | None:
    """The word numbers of a table of offsets, counted from the byte `start`.

    The function returns None if no such table begins at the position `bit`.
    """
    reader.bit = bit
    try:
        if reader.fixed(3) != ENTER:
            return None
        block, _, end = reader.enter()
    except LayoutError:
        return None
    return range(bit // 32 - start // 4, end // 32 - start // 4) if block == SYMBOLS else None


def _same_around(words: tuple[array[int], array[int]], bit: int) -> bool:
    """Whether one or two words of each module are equal in all bits except the 32 bits that begin at `bit`."""
    one, other = (int.from_bytes(each.tobytes(), "little") for each in words)
    return not (one ^ other) & ~(0xFFFFFFFF << bit)
