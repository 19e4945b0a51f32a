"""Compare two modules of LLVM bitcode that one source gave.

nvcc's front end marks each argument of one byte, `bool` among them, with how it is extended to a register: `signext` where
char is signed (x86_64), `zeroext` where it is not (aarch64). For bool, which is 0 or 1, both mean the same. Where such a value
is used as a number, the instructions differ too (sext and zext). So if two modules differ in nothing else, the sign of char
changes nothing.

The format: https://llvm.org/docs/BitCodeFormat.html. A block at the beginning has the attributes. If its length differs, then
the offsets of functions do, which serve readers that skip functions.
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
    """The bitcode is not laid out as LLVM 7 and later write it."""


class Reader:
    """A cursor over the bits of a module."""

    def __init__(self, code: bytes) -> None:
        self.code = code
        self.bit = 0

    def fixed(self, width: int) -> int:
        """A number of so many bits."""
        first, last = self.bit >> 3, (self.bit + width + 7) >> 3
        if last > len(self.code):
            raise LayoutError
        word = int.from_bytes(self.code[first:last], "little")
        value = (word >> (self.bit & 7)) & ((1 << width) - 1)
        self.bit += width
        return value

    def variable(self, width: int) -> int:
        """A number in chunks of so many bits, whose highest says that another one follows."""
        value = shift = 0
        more = 1 << (width - 1)
        while True:
            chunk = self.fixed(width)
            value |= (chunk & (more - 1)) << shift
            if not chunk & more:
                return value
            shift += width - 1

    def enter(self) -> tuple[int, int, int]:
        """Past the header of a block: its id, the width of its abbreviation ids, and the bit behind its end."""
        block, width = self.variable(8), self.variable(4)
        self.bit = (self.bit + 31) & ~31
        words = self.fixed(32)
        return block, width, self.bit + 32 * words


def differ_only_in_extension(one: bytes, other: bytes) -> bool:
    """Whether two modules are equal, except that one has `signext` where the other has `zeroext`."""
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
    """The bit where the content of the module begins, behind its length."""
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
    """The attribute groups, with one kind for both extensions; the first byte of their block and the byte behind it."""
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
    """A group with `signext` in place of `zeroext`: its code, number and parameter, and then attributes by their form."""
    place = 3
    while place < len(group):
        form = group[place]
        if form == 0:  # a kind
            if group[place + 1] == ZEROEXT:
                group[place + 1] = SIGNEXT
            place += 2
        elif form == 1:  # a kind and a number
            place += 3
        elif form in (3, 4):  # one text or two, each up to a zero
            for _ in range(form - 2):
                place = group.index(0, place + 1)
            place += 1
        else:
            raise LayoutError
    return group


def _record(reader: Reader) -> list[int]:
    """An unabbreviated record: its code and its values."""
    code = reader.variable(6)
    return [code, *(reader.variable(6) for _ in range(reader.variable(6)))]


def _equal_rest(one: bytes, start: int, other: bytes, other_start: int, shift: int) -> bool:
    """Whether all behind the attribute groups is equal, where offsets differ by `shift` words: that of the table that has the
    offsets of functions, which comes first, and those in this table."""
    if not shift:
        return one[start:] == other[other_start:]
    words, others = array("I", one[start:]), array("I", other[other_start:])
    different = [number for number in range(len(words)) if words[number] != others[number]]
    if not different:
        return False
    reader, second = Reader(one), Reader(other)
    # The offset has 32 bits and begins at any bit.
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
    """The words of a table of offsets, counted from a byte on; None if there is no such table at this bit."""
    reader.bit = bit
    try:
        if reader.fixed(3) != ENTER:
            return None
        block, _, end = reader.enter()
    except LayoutError:
        return None
    return range(bit // 32 - start // 4, end // 32 - start // 4) if block == SYMBOLS else None


def _same_around(words: tuple[array[int], array[int]], bit: int) -> bool:
    """Whether one word or two are equal in all bits but the 32 from `bit` on."""
    one, other = (int.from_bytes(each.tobytes(), "little") for each in words)
    return not (one ^ other) & ~(0xFFFFFFFF << bit)
