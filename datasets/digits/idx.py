#!/usr/bin/env python3
"""Makes the four IDX files, which `retune run` reads, out of digits.txt beside this file.

    python3 idx.py            # writes
    python3 idx.py --check    # compares instead, and fails on a difference

Needs Python 3.9 or later and nothing else, uses no random numbers.
"""

import gzip
import io
import pathlib
import struct
import sys

FOLDER = pathlib.Path(__file__).parent
INK = "0123456789abcdefg"
SIDE = 8
TRAIN = 1347


def idx(sizes, values):
    header = struct.pack(">HBB", 0, 8, len(sizes)) + b"".join(struct.pack(">I", size) for size in sizes)
    out = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=out, mode="wb", mtime=0) as file:
        file.write(header + bytes(values))
    return out.getvalue()


def main():
    rows = [line.split() for line in (FOLDER / "digits.txt").read_text().splitlines()]
    for name, part in (("train", rows[:TRAIN]), ("test", rows[TRAIN:])):
        # Ink goes from 0 to 16 there, from 0 to 255 here.
        pixels = [(INK.index(ink) * 255 + 8) // 16 for _, picture in part for ink in picture]
        files = {
            f"{name}-images-idx3-ubyte.gz": idx([len(part), SIDE, SIDE], pixels),
            f"{name}-labels-idx1-ubyte.gz": idx([len(part)], [int(digit) for digit, _ in part]),
        }
        for file, content in files.items():
            if "--check" not in sys.argv:
                (FOLDER / file).write_bytes(content)
            elif gzip.decompress((FOLDER / file).read_bytes()) != gzip.decompress(content):
                sys.exit(f"{file} differs")


if __name__ == "__main__":
    main()
