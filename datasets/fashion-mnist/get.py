#!/usr/bin/env python3
"""Unpacks Fashion-MNIST out of Debian's package, beside this file or into another folder.

    apt-get download dataset-fashion-mnist
    python3 get.py dataset-fashion-mnist_*_all.deb [FOLDER]

Needs Python 3.9 or later and nothing else, and refuses any other package file.
"""

import hashlib
import io
import lzma
import pathlib
import sys
import tarfile

PACKAGE_SHA256 = "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
INSIDE = "./usr/share/datasets/fashion-mnist/"
FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def members(package):
    """The files of an `ar` archive, by name."""
    at, found = 8, {}
    while at + 60 <= len(package):
        header = package[at:at + 60]
        size = int(header[48:58])
        found[header[:16].decode().strip().rstrip("/")] = package[at + 60:at + 60 + size]
        at += 60 + size + size % 2
    return found


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    package = pathlib.Path(sys.argv[1]).read_bytes()
    found = hashlib.sha256(package).hexdigest()
    if found != PACKAGE_SHA256:
        sys.exit(f"{sys.argv[1]} has sha256 {found}, expected {PACKAGE_SHA256}")
    folder = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else pathlib.Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO(lzma.decompress(members(package)["data.tar.xz"]))
    with tarfile.open(fileobj=data) as archive:
        for name in FILES:
            content = archive.extractfile(INSIDE + name).read()
            (folder / name).write_bytes(content)
            print(f"{folder / name}: {len(content)} bytes")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")


if __name__ == "__main__":
    main()
