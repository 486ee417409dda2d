"""Bytes, JSON, tensors, archives and tables, changed at random into what may do harm."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import struct
import zipfile

from fomaml.sealed import DIGEST, sealed

TEXTS = {  # as they stand in JSON: some are no JSON, or none that Python takes
    "@nan@": "NaN", "@large@": "1e400", "@huge@": "9" * 5000, "@int@": "9" * 400, "@deep@": "[" * 100_000,
    "@nested@": "[" * 500 + "]" * 500, "@half@": '"\\ud800"', "@line@": '"a\\nb\\u0000\\u2028"',
    "@long@": f'"{"x" * 100_000}"',
}  # fmt: skip
VALUES = [*TEXTS, None, True, False, -1, 0, 1, 2**31, 2**63, -(2**64), 1e308, 1e-320, 0.5, "", "x", "../x",
    [], {}, [[]], [1, "x", None],
          {"": {}}, {"x": [{}]}]  # fmt: skip
WORDS = [
    "nan", "inf", "-inf", "1e400", "-1", "0", "1", "2", "3", "0.5", "1e-320", "9" * 30, "9" * 5000,
    "2147483648", "", " ", "x", "é",
    "x" * 5000, "a\nb", "a\x00b", "a\udcffb", "--", "-", "None", "True", "[1, 2]", "{", "(" * 300,
    "/dev/zero", "/dev/full",
    "/proc/self/mem", "/", ".", "..", "~", "~nobody/x", "none", "auto", "*.png", "$(x)", "%s%n", "'", '"',
    "cuda:99", "meta",
]  # fmt: skip


def spoiled(data: bytes, random) -> bytes:
    """Bytes with one to four of them, or a part, changed, taken away or doubled."""
    found = bytearray(data)
    for _ in range(random.randint(1, 4)):
        place = random.randint(0, max(0, len(found) - 1))
        # what a file says of itself stands at its beginning or its end
        place = random.choice([place, min(place, 64), max(0, len(found) - 1 - place % 128)])
        length = random.choice([1, 2, 4, 8, 100])
        kind = random.randint(0, 6)
        if kind == 0 and found:
            found[place % len(found)] ^= 1 << random.randint(0, 7)
        elif kind == 1:
            del found[place:]
        elif kind == 2:
            found[place:place] = bytes(random.randint(0, 255) for _ in range(length))
        elif kind == 3:
            found[place : place + length] = random.choice([b"\xff", b"\0", b"\x7f", b"9"]) * length
        elif kind == 4:
            found[place : place + length] = b""
        elif kind == 5:
            found += found[place : place + 1000]
        else:
            found[place : place + 4] = struct.pack(
                random.choice("<>") + "I", random.choice([2**31, 2**32 - 1, 3 * 2**30, 1])
            )
    return bytes(found)


def spoiled_values(values, random):
    """The text of JSON with one to three values exchanged for hostile ones, or left out, or with others beside them."""
    for _ in range(random.randint(1, 3)):
        place, keys = values, []
        while isinstance(place, dict | list) and len(place):
            keys = [*place] if isinstance(place, dict) else [*range(len(place))]
            key = random.choice(keys)
            if random.randint(0, 2) == 0 or not (isinstance(place[key], dict | list) and len(place[key])):
                kind = random.randint(0, 4)
                if kind == 0:
                    del place[key]
                elif kind == 1 and isinstance(place, dict):
                    place[random.choice(["x", "", "format", "@long@", "\n"])] = place.pop(key)
                else:
                    place[key] = copy.deepcopy(random.choice(VALUES))
                break
            place = place[key]
    return values


def as_text(values) -> str:
    """JSON with what stands in `TEXTS` for its names."""
    return re.sub('"(@[a-z]+@)"', lambda found: TEXTS[found[1]], json.dumps(values))


def spoiled_json(data: bytes, random) -> bytes:
    """A file of JSON, changed in its bytes or its values; of the latter half have a digest that is right."""
    if random.randint(0, 3) == 0:
        return spoiled(data, random)
    values = json.loads(data)
    digest = values.pop(DIGEST, None)
    values = spoiled_values(values, random)
    if digest is not None and isinstance(values, dict):
        if random.randint(0, 1):
            with contextlib.suppress(ValueError, RecursionError, OverflowError):
                return sealed(json.loads(as_text(values))).encode("utf-8", "replace")
        values[DIGEST] = digest
    return as_text(values).encode()


def spoiled_lines(data: bytes, random) -> bytes:
    """A file of lines of JSON."""
    if random.randint(0, 1):
        return spoiled(data, random)
    lines = data.splitlines()
    place = random.randint(0, len(lines) - 1)
    values = json.loads(lines[place])
    if random.randint(0, 1):
        values.pop("crc32", None)
    lines[place] = as_text(spoiled_values(values, random)).encode()
    return b"\n".join(lines) + b"\n"


def spoiled_tensors(data: bytes, random) -> bytes:
    """A safetensors file, changed in its bytes or in its header's values."""
    if random.randint(0, 1):
        return spoiled(data, random)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    inner = header.get("__metadata__", {}).get("fomaml")
    if inner is not None and random.randint(0, 1):
        header["__metadata__"]["fomaml"] = as_text(spoiled_values(json.loads(inner), random))
    else:
        header = spoiled_values(header, random)
    text = as_text(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def spoiled_zip(data: bytes, random) -> bytes:
    """An archive, changed in its bytes, or with changed members."""
    if random.randint(0, 1):
        return spoiled(data, random)
    made = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as before,
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as after,
    ):
        names = before.namelist()
        chosen = random.choice(names)
        for name in names:
            content = before.read(name)
            if name == chosen:
                content = random.choice([spoiled(content, random), b"", bytes(2**22), b"%!PS\n"])
                name = random.choice([name, "../x", "x\n", "x" * 300])
            after.writestr(name, content)
    return made.getvalue()


def spoiled_text(data: bytes, random) -> bytes:
    """A table, changed in its bytes or in one of its cells."""
    if random.randint(0, 1):
        return spoiled(data, random)
    cells = re.split(rb"([,\t\n])", data)
    place = 2 * random.randint(0, len(cells) // 2)
    cells[place] = random.choice(WORDS).encode("utf-8", "surrogateescape")
    return b"".join(cells)
