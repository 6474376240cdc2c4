"""What can happen to files: seeded, each mutation says in words what it did."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

RAW = "@@raw{}@@"
"""Stands in a JSON tree for text that no tree can express."""
NASTY: tuple[str, ...] = (
    "1e999", "-1e999", "NaN", "Infinity", "-1", "0", "1", "2.5", "1e-400", "-0.0",
    "50000000", "2147483648", "9223372036854775808", "1" + "0" * 400, "9" * 5000,
    "true", "false", "null", '""', '"\\ud800"', '"a\\u0000b"', '"..\\/..\\/x"', '"/etc/passwd"',
    '"\\u001b[31m"', '"' + "x" * 5000 + '"', "[]", "{}", "[[]]", '{"a": 1, "a": 2}', '"2"',
    "[" * 200 + "]" * 200, "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000,
    "[" + "1," * 5000 + "1]", '"\U0001f600"', "[null, true, \"x\", 1.5]",
)  # fmt: skip
YAML_NASTY: tuple[str, ...] = (
    "!!python/object/apply:os.system ['touch CANARY']", "!!python/name:os.system", "!!int ''",
    "!!float x", "!!bool x", "!!timestamp x", "!!binary '*'", "!!set {a, b}", "!!omap [a: 1]",
    "&a [*a]", "*nowhere", "2024-99-99", "2024-01-01", ".inf", ".nan", "0x" + "f" * 5000,
    "1:" * 3000 + "1", "'\\ud800'", '"\\ud800"', "- - - -", "[" * 3000, "{" * 3000, "? x", "|",
    "1e999", "-1", "50000000", "9" * 5000, "~", "yes", "''", "[1, 2", "a: b: c", "<<: 3", "@x", "`",
)  # fmt: skip
JINJA_NASTY: tuple[str, ...] = (
    "{{ raise_exception('\\ud800\\x1b') }}", "{{ ''.__class__ }}", "{{ messages[99].x.y }}",
    "{{ 'x' * 3000000000 }}", "{% for i in range(99999999) %}x{% endfor %}", "{{ 1 / 0 }}",
    "{{ 10 ** 9999999 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{", "{#",
    "{% include '/etc/passwd' %}", "{{ cycler.__init__.__globals__ }}", "{{ messages | map('x') }}",
    "{{ '%s' | format(messages) | tojson | list | length }}", "{{ lipsum(n=100) }}",
    "{{ none + 1 }}",
    "{{ '\\ud800' }}", "(" * 500, "{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "{{ 9 ** 9999 }}",
)  # fmt: skip
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


def files_of(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if not p.is_symlink() and p.is_file())


# -- bytes ------------------------------------------------------------------------------------


def flip_bits(path: Path, rng: Random) -> str:
    data = bytearray(path.read_bytes() or b"\0")
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return "flip bits"


def flip_early_bits(path: Path, rng: Random) -> str:
    data = bytearray(path.read_bytes() or b"\0")
    data[rng.randrange(min(64, len(data)))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return "flip a bit of the first 64 bytes"


def truncate(path: Path, rng: Random) -> str:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) + 1)])
    return "truncate"


def extend(path: Path, rng: Random) -> str:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice((1, 8, 5000))))
    return "append random bytes"


def overwrite(path: Path, rng: Random) -> str:
    data = bytearray(path.read_bytes())
    begin, length = rng.randrange(len(data) + 1), rng.choice((1, 4, 8, 64))
    fill = rng.choice((b"\0", b"\xff", b"[", b'"', b"\n", None))
    data[begin : begin + length] = rng.randbytes(length) if fill is None else fill * length
    path.write_bytes(data)
    return f"overwrite with {fill!r}"


def cut_out(path: Path, rng: Random) -> str:
    data = path.read_bytes()
    begin = rng.randrange(len(data) + 1)
    path.write_bytes(data[:begin] + data[begin + rng.choice((1, 2, 16, 200)) :])
    return "cut bytes out"


def repeat(path: Path, rng: Random) -> str:
    data = path.read_bytes()
    begin = rng.randrange(len(data) + 1)
    path.write_bytes(data[:begin] + data[begin : begin + rng.choice((1, 8, 100))] + data[begin:])
    return "repeat bytes"


def empty(path: Path, rng: Random) -> str:
    path.write_bytes(b"")
    return "empty"


def sparse_and_huge(path: Path, rng: Random) -> str:
    with path.open("r+b") as file:
        file.truncate(rng.choice((200 << 20, 5 << 30)))
    return "grow by a hole of hundreds of megabytes"


# -- the directory ----------------------------------------------------------------------------


def delete(path: Path, rng: Random) -> str:
    path.unlink()
    return "delete"


def to_pipe(path: Path, rng: Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "replace by a pipe"


def to_link(path: Path, rng: Random) -> str:
    path.unlink()
    target = rng.choice(("/dev/zero", "/dev/null", "/etc/passwd", path.name, "nowhere", "."))
    path.symlink_to(target)
    return f"replace by a link to {target}"


def to_directory(path: Path, rng: Random) -> str:
    path.unlink()
    path.mkdir()
    return "replace by a directory"


def swap(path: Path, rng: Random) -> str:
    other = rng.choice(files_of(path.parent))
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)
    return f"swap with {other.name}"


def rename(path: Path, rng: Random) -> str:
    name = rng.choice(
        (path.name.upper(), "x" * 255, path.stem, f"{path.name}.tmp", "a\nb", "\udcff", "\x1b[31m")
    )
    path.rename(path.with_name(name))
    return f"rename to {name!r}"


def add_file(path: Path, rng: Random) -> str:
    name = rng.choice(
        ("model-00003-of-00002.safetensors", "consolidated.01.pth", "tokenizer.model", "COMPLETE",
         "model.safetensors.index.json", "params.json", "config.json", "chat_template.jinja",
         "tekken.json", "pytorch_model.bin", "\udcff", "optimizer.safetensors.index.json")
    )  # fmt: skip
    if not (path.parent / name).exists():
        shutil.copyfile(path, path.parent / name)
    return f"copy to {name!r}"


# -- JSON -------------------------------------------------------------------------------------


def _places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    if not isinstance(tree, dict | list):
        return found
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found.append((tree, key))
        _places(value, found)
    return found


def mutate_json(text: str, rng: Random) -> tuple[str, str]:
    """One to three changes of a JSON text, and their description."""
    try:
        tree = json.loads(text)
    except ValueError:
        return text, "no JSON to change"
    raw: list[str] = []
    said = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(tree, [])
        if not places:
            break
        holder, key = rng.choice(places)
        kind = rng.randrange(7)
        if kind <= 2:
            raw.append(rng.choice(NASTY))
            holder[key] = RAW.format(len(raw) - 1)
            said.append(f"{key} = {raw[-1][:40]}")
        elif kind == 3:
            holder.pop(key)
            said.append(f"drop {key}")
        elif kind == 4 and isinstance(holder, dict):
            name = rng.choice((f"{key}x", "\ud800", "", "x" * 5000, "__metadata__", "mistral_ms"))
            holder[name] = holder[key] if rng.random() < 0.5 else holder.pop(key)
            said.append(f"{key} also or only as {name[:20]!r}")
        elif kind == 5 and isinstance(holder, dict):
            raw.append(json.dumps(holder[key]) + f", {json.dumps(key)}: {rng.choice(NASTY)}")
            holder[key] = RAW.format(len(raw) - 1)
            said.append(f"{key} twice")
        else:
            other_holder, other = rng.choice(places)
            try:
                holder[key], other_holder[other] = other_holder[other], holder[key]
                text = json.dumps(tree)
            except (KeyError, IndexError, ValueError, RecursionError):
                return text, "no change"
            said.append(f"swap {key} and {other}")
    text = json.dumps(tree)
    for number, value in enumerate(raw):
        text = text.replace(json.dumps(RAW.format(number)), value)
    return text, "; ".join(said)


def json_file(path: Path, rng: Random) -> str:
    try:
        text, said = mutate_json(path.read_text(), rng)
    except UnicodeDecodeError:
        return "no change"
    path.write_text(text)
    return f"JSON: {said}"


def json_line(path: Path, rng: Random) -> str:
    lines = path.read_text().splitlines() or [""]
    number = rng.randrange(len(lines))
    lines[number], said = mutate_json(lines[number], rng)
    path.write_text("\n".join(lines))
    return f"line {number}: {said}"


def long_line(path: Path, rng: Random) -> str:
    filling = rng.choice(("x", "[", "[],", '{"a":1},', "\\", "\U0001f600"))
    path.write_text('{"text": "' + filling * (24_000_000 // len(filling.encode())))
    return f"one line of 24 MB of {filling}"


def safetensors_header(path: Path, rng: Random) -> str:
    data = path.read_bytes()
    if len(data) < 8:
        return "no change"
    (length,) = struct.unpack("<Q", data[:8])
    kind = rng.randrange(8)
    if kind == 0:
        length = rng.choice((0, 1, length - 1, length + 1, 1 << 24, 1 << 40, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", length % 2**64) + data[8:])
        return f"header length {length}"
    if kind == 1:
        filling = rng.choice((b" ", b"[", b"[],", b'{"a":')) * (15 << 20)
        header = filling[: 15 << 20]
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
        return f"a header of 15 MB of {filling[:6]!r}"
    try:
        text, said = mutate_json(data[8 : 8 + length].decode(), rng)
    except UnicodeDecodeError:
        return "no change"
    header = text.encode("utf-8", "replace")
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    return f"header: {said}"


# -- YAML -------------------------------------------------------------------------------------


def yaml_file(path: Path, rng: Random) -> str:
    lines = path.read_text(errors="replace").splitlines() or [""]
    number, kind = rng.randrange(len(lines)), rng.randrange(6)
    key = lines[number].partition(":")[0]
    value = rng.choice(YAML_NASTY)
    if kind == 0:
        lines = [BOMB, *lines, f"model: *a{rng.randrange(1, 10)}"]
        said = "an alias bomb"
    elif kind == 1:
        lines.insert(number, lines[number])
        said = f"{key} twice"
    elif kind == 2:
        lines[number] = lines[number].strip()
        said = f"{key} without indentation"
    elif kind == 3:
        lines.insert(number, f"{rng.choice(('1', '~', '[1, 2]', '{a: 1}', '<<', '!!str x'))}: 3")
        said = "a key that is no name"
    else:
        lines[number] = f"{key}: {value}"
        said = lines[number][:60]
    path.write_text("\n".join(lines), errors="replace")
    return f"YAML: {said}"


def jinja_file(path: Path, rng: Random) -> str:
    lines = path.read_text().splitlines()
    number, what = rng.randrange(len(lines) + 1), rng.choice(JINJA_NASTY)
    path.write_text("\n".join([*lines[:number], what, *lines[number + rng.randrange(2) :]]))
    return f"Jinja: {what[:60]}"


# -- zip archives of torch --------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, ("touch CANARY",)


def zip_archive(path: Path, rng: Random) -> str:
    if not zipfile.is_zipfile(path):
        return flip_early_bits(path, rng)
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    chosen = rng.randrange(len(entries))
    name, content = entries[chosen]
    how = zipfile.ZIP_STORED
    kind = rng.randrange(8)
    if kind == 0:
        how, said = zipfile.ZIP_DEFLATED, "deflate all entries"
    elif kind == 1:
        how, said = zipfile.ZIP_BZIP2, "compress all entries with bzip2"
    elif kind == 2:
        entries.pop(chosen)
        said = f"drop {name}"
    elif kind == 3:
        entries[chosen] = (rng.choice((f"../{name}", "/x", "x" * 300, f"{name}2", "")), content)
        said = f"rename {name} to {entries[chosen][0][:40]!r}"
    elif kind == 4:
        entries.append((name, bytes(len(content))))
        said = f"{name} twice, then of zeros"
    elif kind == 5:
        evil = pickle.dumps({"model.norm.weight": Evil()}, protocol=2)
        entries = [(n, evil if n.endswith("data.pkl") else c) for n, c in entries]
        said = "a pickle that runs a command"
    elif kind == 6:
        entries[chosen] = (name, content[: len(content) // 2])
        said = f"half of {name}"
    else:
        how = zipfile.ZIP_DEFLATED
        entries[chosen] = (name, content + bytes(300 << 20))
        said = f"{name} grows to 300 MB of zeros, deflated"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", how) as archive:
        warnings.simplefilter("ignore")
        for each, data in entries:
            archive.writestr(each or "x", data)
    return f"zip: {said}"


BYTES = (flip_bits, flip_bits, truncate, extend, overwrite, overwrite, cut_out, repeat, empty)
PLACES = (delete, to_pipe, to_link, to_directory, swap, rename, add_file, sparse_and_huge)
BY_SUFFIX: dict[str, tuple[Callable[[Path, Random], str], ...]] = {
    ".json": (json_file,),
    "": (json_file,),  # COMPLETE
    ".safetensors": (safetensors_header, safetensors_header, flip_early_bits),
    ".yaml": (yaml_file,),
    ".bin": (zip_archive, zip_archive, flip_early_bits),
    ".pth": (zip_archive, zip_archive, flip_early_bits),
    ".jsonl": (json_line, json_line, long_line),
    ".txt": (long_line,),
    ".jinja": (jinja_file, jinja_file, jinja_file, long_line),
}


def damage(root: Path, rng: Random) -> tuple[str, list[Path]]:
    """Changes one to three files below ``root``.

    Returns:
        What was done, and to which files.
    """
    said, touched = [], []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = files_of(root)
        if not files:
            break
        path = rng.choice(files)
        own = BY_SUFFIX.get(path.suffix, BYTES)
        mutate = rng.choice(rng.choice((own, own, own, BYTES, PLACES)))
        if path.stat().st_size > 64 << 20 and mutate not in PLACES:
            continue  # the hole of an earlier mutation
        touched.append(path)
        try:
            how = mutate(path, rng)
        except Exception:  # earlier changes leave files that are no zip, no JSON, no text
            how = "what an earlier change has left cannot be changed like this"
        said.append(f"{path.relative_to(root)}: {how}")
    return " | ".join(said) or "nothing", touched
