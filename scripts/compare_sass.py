r"""Compares the machine code of two cubins kernel by kernel, ignoring the kernels' names.

Run `python scripts/compare_sass.py BEFORE.cubin AFTER.cubin` on the results of

    nvcc -cubin -arch=sm_90 -O3 -std=c++20 -DNDEBUG -D__LINE__=1 -Iinclude \
        -o AFTER.cubin csrc/cuda/float16.cu

before and after a change; -D__LINE__=1 keeps the line numbers of assertions out of the code.
"""

import collections
import struct
import sys


def kernels(path: str) -> dict[str, bytes]:
    """Maps the name of each kernel in a cubin, an ELF file, to its code."""
    with open(path, "rb") as file:
        elf = file.read()
    table = struct.unpack_from("<Q", elf, 0x28)[0]
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    strings = headers[names][4]
    code = {}
    for name, _, _, _, start, length in headers:
        section = elf[strings + name : elf.index(b"\0", strings + name)].decode()
        if section.startswith(".text."):
            code[section.removeprefix(".text.")] = elf[start : start + length]
    return code


def main() -> None:
    before, after = (kernels(path) for path in sys.argv[1:])
    unmatched = collections.defaultdict(list)
    for name, code in before.items():
        unmatched[code].append(name)
    added = [
        name for name, code in after.items() if not unmatched[code] or not unmatched[code].pop()
    ]
    removed = [name for names in unmatched.values() for name in names]
    print(f"{len(before)} kernels before, {len(after)} after, {len(after) - len(added)} identical")
    for sign, names in (("-", removed), ("+", added)):
        for name in names:
            print(sign, name)
    sys.exit(bool(added or removed))


if __name__ == "__main__":
    main()
