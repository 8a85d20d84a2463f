"""Read what shared libraries of Linux, Windows and macOS export and import."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Binary:
    """A shared library for a 64-bit processor.

    Parameters
    ----------
    kind, machine : str
        ``"ELF"``, ``"PE"`` or ``"Mach-O"``; ``"x86_64"`` or ``"aarch64"``.
    exports : set of str
        Names of functions and data, as in C.
    imports : set of str
        Likewise.
    libraries : set of str
        Libraries that it needs.
    versions : set of str
        Versions of these that it needs, for ELF, such as ``"GLIBC_2.17"``.
    signed : bool
        Whether it has a code signature, for Mach-O.
    """

    kind: str
    machine: str
    exports: set[str]
    imports: set[str]
    libraries: set[str]
    versions: set[str] = dataclasses.field(default_factory=set)
    signed: bool = False

    @classmethod
    def read(cls, data: bytes) -> Binary:
        """Parse the content of a library."""
        if data[:4] == b"\x7fELF":
            return _elf(data)
        return _pe(data) if data[:2] == b"MZ" else _mach_o(data)


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def _elf(data: bytes) -> Binary:
    (machine,) = struct.unpack_from("<H", data, 18)
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + size * i) for i in range(count)]
    exports, imports, libraries, versions = set(), set(), set(), set()
    for _, kind, _, _, offset, length, link, count, _, _ in sections:
        if kind == 11:  # SHT_DYNSYM
            for symbol in range(offset + 24, offset + length, 24):
                name, info, _, section = struct.unpack_from("<IBBH", data, symbol)
                if info >> 4:  # Not local.
                    found = exports if section else imports
                    found.add(_text(data, sections[link][4] + name))
        if kind == 6:  # SHT_DYNAMIC
            for tag, value in struct.iter_unpack("<QQ", data[offset : offset + length]):
                if tag == 1:  # DT_NEEDED
                    libraries.add(_text(data, sections[link][4] + value))
        if kind == 0x6FFFFFFE:  # SHT_GNU_VERNEED
            for _ in range(count):  # Libraries.
                _, number, _, version, following = struct.unpack_from("<HHIII", data, offset)
                version += offset
                for _ in range(number):
                    name, step = struct.unpack_from("<II", data, version + 8)
                    versions.add(_text(data, sections[link][4] + name))
                    version += step
                offset += following
    name = {62: "x86_64", 183: "aarch64"}[machine]
    return Binary("ELF", name, exports, imports, libraries, versions)


def _pe(data: bytes) -> Binary:
    (header,) = struct.unpack_from("<I", data, 60)
    assert data[header : header + 4] == b"PE\0\0"
    machine, count = struct.unpack_from("<HH", data, header + 4)
    (optional,) = struct.unpack_from("<H", data, header + 20)
    table = header + 24 + optional
    sections = [struct.unpack_from("<IIII", data, table + 40 * i + 8) for i in range(count)]

    def at(address: int) -> int:
        """Return the position of what will be at an address."""
        for size, start, length, offset in sections:
            if start <= address < start + max(size, length):
                return int(address - start + offset)
        raise ValueError(f"no section holds {address}")

    def words(position: int, form: str) -> Iterator[int]:
        while (value := struct.unpack_from(form, data, position)[0]) != 0:
            yield value
            position += struct.calcsize(form)

    exported, _, imported, _ = struct.unpack_from("<IIII", data, header + 24 + 112)
    number, _, names = struct.unpack_from("<III", data, at(exported) + 24)
    pointers = struct.unpack_from(f"<{number}I", data, at(names))
    imports, libraries = set(), set()
    for position in range(at(imported) if imported else len(data), len(data), 20):
        lookup, _, _, name, _ = struct.unpack_from("<IIIII", data, position)
        if not name:
            break
        libraries.add(_text(data, at(name)))
        imports |= {_text(data, at(entry) + 2) for entry in words(at(lookup), "<Q")}
    exports = {_text(data, at(pointer)) for pointer in pointers}
    return Binary("PE", {0x8664: "x86_64"}[machine], exports, imports, libraries)


def _mach_o(data: bytes) -> Binary:
    magic, machine, _, _, count = struct.unpack_from("<IIIII", data)
    assert magic == 0xFEEDFACF
    position, signed = 32, False
    exports, imports, libraries = set(), set(), set()
    for _ in range(count):
        command, size = struct.unpack_from("<II", data, position)
        if command == 0x0C:  # LC_LOAD_DYLIB
            libraries.add(_text(data, position + struct.unpack_from("<I", data, position + 8)[0]))
        signed |= command == 0x1D  # LC_CODE_SIGNATURE
        if command == 0x02:  # LC_SYMTAB
            symbols, number, strings = struct.unpack_from("<III", data, position + 8)
            for symbol in range(symbols, symbols + 16 * number, 16):
                name, kind = struct.unpack_from("<IB", data, symbol)
                if kind & 1 and not kind & 0xE0:  # N_EXT, and not for a debugger.
                    found = exports if kind & 0x0E else imports
                    found.add(_text(data, strings + name).removeprefix("_"))
        position += size
    machines = {0x0100000C: "aarch64"}
    return Binary("Mach-O", machines[machine], exports, imports, libraries, signed=signed)
