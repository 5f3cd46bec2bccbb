#!/usr/bin/env python3
"""Makes train.jsonl and test.jsonl out of WordNet 3.0.

    apt-get download wordnet-base=1:3.0-37
    python3 make.py wordnet-base_1%3a3.0-37_all.deb

Needs Python 3.9 or later and nothing else, uses no random numbers, and refuses any other package
file. With --check it compares instead of writing, and fails on a difference.
"""

import collections
import hashlib
import io
import json
import lzma
import pathlib
import re
import sys
import tarfile

PACKAGE_SHA256 = "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"

# WordNet sorts nouns into 26 files; these ten are told apart by a person without training.
KINDS = {
    5: "animal",
    6: "object",
    8: "body",
    12: "feeling",
    13: "food",
    15: "place",
    18: "person",
    20: "plant",
    27: "substance",
    28: "time",
}
TRAIN_PER_KIND = 60
TEST_PER_KIND = 16
GLOSS_CHARACTERS = range(12, 111)

SYSTEM = (
    "What kind of thing is it? Answer with one word: animal, body, feeling, food, object, "
    "person, place, plant, substance or time."
)

# Entries a demonstration can do without: WordNet records slurs, crime and anatomy like any word.
LEFT_OUT = re.compile(
    r"offensive|disparag|derogat|slang|vulgar|obscen|sexual|prostitut|genital|urin|feces|anus|"
    r"slave|negro|ethnic|race\b|racial|nazi|terror|murder|kill|rape|suicid|drug|narcotic|"
    r"breast|penis|vagina|testi|buttock|crotch|rectum|excre|pubic|ejacul|"
    r"corpse|cannibal|whore|homosexual|ovum|sperm|scrot|uter|menstr|hermaphrod|eunuch|nude|politic|communis|cadaver|dead body|insult|jew\b|jews|ghetto",
    re.IGNORECASE,
)


def wordnet_files(package):
    """Reads data.noun and cntlist.rev out of a Debian package (an `ar` that holds a tar)."""
    data = pathlib.Path(package).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != PACKAGE_SHA256:
        sys.exit(f"{package} has sha256 {digest}, expected {PACKAGE_SHA256}")
    offset = 8
    while offset < len(data):
        name = data[offset : offset + 16].decode().strip()
        size = int(data[offset + 48 : offset + 58])
        body = data[offset + 60 : offset + 60 + size]
        if name.startswith("data.tar"):
            if name.endswith(".xz"):
                body = lzma.decompress(body)
            with tarfile.open(fileobj=io.BytesIO(body)) as tar:
                folder = "./usr/share/wordnet/"
                return [
                    tar.extractfile(folder + name).read().decode("ascii").splitlines()
                    for name in ("data.noun", "cntlist.rev")
                ]
        offset += 60 + size + size % 2
    sys.exit(f"{package} holds no data.tar")


def sense_counts(lines):
    """How often each noun sense was met in WordNet's tagged texts."""
    counts = {}
    for line in lines:
        key, _, count = line.split()
        word, sense = key.split("%")
        part_of_speech, file_number, id_in_file = (int(n) for n in sense.split(":")[:3])
        if part_of_speech == 1:
            counts[word, file_number, id_in_file] = int(count)
    return counts


def synsets(lines, counts):
    """Yields (kind, count, offset, word, gloss) for every synset of the ten kinds."""
    for line in lines:
        if line.startswith("  "):
            continue
        head, gloss = line.split(" | ", 1)
        fields = head.split(" ")
        file_number, num_words = int(fields[1]), int(fields[3], 16)
        if file_number not in KINDS:
            continue
        words = [(fields[4 + 2 * i], int(fields[5 + 2 * i], 16)) for i in range(num_words)]
        # Instances (pointer @i) are proper names.
        if " @i " in head:
            continue
        count = sum(counts.get((word.lower(), file_number, i), 0) for word, i in words)
        yield KINDS[file_number], count, int(fields[0]), words[0][0].replace("_", " "), gloss


def first_clause(gloss):
    """The definition without examples, remarks in brackets, Latin names and second clauses."""
    gloss = re.sub(r"\([^)]*\)", " ", gloss)
    gloss = re.sub(r" (of|in) the( [a-z]+)? (genus|family) [A-Z]\w+", "", gloss)
    gloss = re.split(r';|"|:(?!\d)', gloss)[0]
    return re.sub(r"\s+", " ", gloss).strip(" :,.")


def usable(word, gloss):
    text = f"{word} {gloss}"
    return (
        re.fullmatch(r"[a-z]+(?: [a-z]+)?", word) is not None
        and len(gloss) in GLOSS_CHARACTERS
        and re.fullmatch(r"[a-z0-9][A-Za-z0-9 ,'-]*", gloss) is not None
        # What is left of "a member of the genus …" says nothing.
        and " member" not in gloss
        and LEFT_OUT.search(text) is None
    )


def rows(lines):
    """The commonest words of each kind, every word and every definition once."""
    data, counts = lines
    candidates = sorted(
        (-count, offset, kind, word, first_clause(gloss))
        for kind, count, offset, word, gloss in synsets(data, sense_counts(counts))
        if count > 0
    )
    # A word with senses of two kinds may be cited under either, so it is used under neither.
    kinds_of = collections.defaultdict(set)
    for _, _, kind, word, _ in candidates:
        kinds_of[word].add(kind)
    seen_words, seen_glosses = set(), set()
    by_kind = {kind: [] for kind in KINDS.values()}
    for _, _, kind, word, gloss in candidates:
        wanted = by_kind[kind]
        full = len(wanted) == TRAIN_PER_KIND + TEST_PER_KIND
        if full or not usable(word, gloss) or len(kinds_of[word]) > 1:
            continue
        if word in seen_words or gloss in seen_glosses:
            continue
        seen_words.add(word)
        seen_glosses.add(gloss)
        wanted.append((word, gloss))
    return by_kind


def order(row):
    """A fixed order that has nothing to do with words or kinds."""
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()


def messages(word, gloss, kind):
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{word}: {gloss}"},
            {"role": "assistant", "content": kind},
        ]
    }


def files(package):
    """The two files' texts."""
    train, test = [], []
    for kind, found in rows(wordnet_files(package)).items():
        if len(found) < TRAIN_PER_KIND + TEST_PER_KIND:
            sys.exit(f"only {len(found)} words of kind {kind}")
        made = sorted((messages(word, gloss, kind) for word, gloss in found), key=order)
        train += made[:TRAIN_PER_KIND]
        test += made[TRAIN_PER_KIND:]
    return {
        name: "".join(json.dumps(row) + "\n" for row in sorted(part, key=order))
        for name, part in (("train.jsonl", train), ("test.jsonl", test))
    }


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    if len(arguments) != 1:
        sys.exit(__doc__)
    folder = pathlib.Path(__file__).resolve().parent
    for name, text in files(arguments[0]).items():
        path = folder / name
        if "--check" in sys.argv:
            if path.read_text() != text:
                sys.exit(f"{name} is not what make.py makes; run it without --check")
        else:
            path.write_text(text)
        print(hashlib.sha256(text.encode()).hexdigest(), name, text.count("\n"), "rows")


if __name__ == "__main__":
    main()
