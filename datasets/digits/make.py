#!/usr/bin/env python3
"""Makes digits.txt out of the digits that scikit-learn carries.

    pip download --no-deps --only-binary=:all: --python-version 3.11 \
        --platform manylinux2014_x86_64 scikit-learn==1.7.2
    python3 make.py scikit_learn-1.7.2-cp311-*.whl

Needs Python 3.9 or later and nothing else, uses no random numbers, and refuses any other wheel.
With --check it compares instead of writing, and fails on a difference.
"""

import gzip
import hashlib
import pathlib
import sys
import zipfile

WHEEL_SHA256 = "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d"
MEMBER = "sklearn/datasets/data/digits.csv.gz"

# A pixel counts inked points of a block of 4 x 4: 17 values, one letter each.
LETTERS = "0123456789abcdefg"


def line(row):
    """The digit, a space, then the 64 pixels from left to right and top to bottom."""
    *pixels, digit = (int(value) for value in row.split(","))
    if len(pixels) != 64 or digit not in range(10):
        sys.exit(f"a row is no picture of 8 x 8: {row}")
    return f"{digit} {''.join(LETTERS[pixel] for pixel in pixels)}\n"


def text(wheel):
    data = pathlib.Path(wheel).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != WHEEL_SHA256:
        sys.exit(f"{wheel} has sha256 {digest}, expected {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as files:
        rows = gzip.decompress(files.read(MEMBER)).decode("ascii").splitlines()
    return "".join(line(row) for row in rows)


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    if len(arguments) != 1:
        sys.exit(__doc__)
    path = pathlib.Path(__file__).resolve().parent / "digits.txt"
    made = text(arguments[0])
    if "--check" in sys.argv:
        if path.read_text() != made:
            sys.exit("digits.txt is not what make.py makes; run it without --check")
    else:
        path.write_text(made)
    print(hashlib.sha256(made.encode()).hexdigest(), path.name, made.count("\n"), "rows")


if __name__ == "__main__":
    main()
