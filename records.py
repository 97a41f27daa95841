"""Text files of anybody's, and work that is kept from run to run.

    rows = read_rows(path)                       # JSON lines that survive a kill
    append_rows(path, rows)
    name = the(row, "file_name", str, "captions.json, row 7")
    claim(out)                                   # one run at a time writes into a folder
    same_settings(out, settings)

What is read may be of any shape: what is not as expected is a ValueError of one line that names the
file. What is written replaces what was there as a whole, or not at all.
Copy this file alone.
"""
import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import socket
import stat
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:                              # Windows
    fcntl = None

# what moves a terminal's cursor, or turns the direction of text
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
LONGEST = 1_000_000                              # letters of a line that is read as text
CLAIMED = {}                                     # {folder: open file}; locks end with the process
KINDS = {str: "a text", int: "a whole number", float: "a number", list: "a list",
         dict: "{name: value}", type(None): "null"}


# ---------------------------------------------------------------- text
def visible(text):
    """A text with its control characters as escapes."""
    return CONTROL.sub(lambda c: ascii(c[0])[1:-1], text)


def one_line(text, where="a caption"):
    """Any white space becomes one space: a line break in a caption breaks line-based scorers.
    Raises ValueError, which begins with `where`, for what can't be a caption."""
    if len(text) > LONGEST:
        raise ValueError(f"{where}: it has {len(text):,} letters, at most {LONGEST:,} are read")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where}: {ascii(text)[:60]} is no text (half of a pair)") from e
    return " ".join(text.split())


def read_text(path):
    """A text file of UTF-8, with or without its mark (BOM). Raises ValueError where it is none."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is no text in UTF-8 (byte {e.start})") from e
    if "\0" in text:
        raise ValueError(f"{path} is no text: it has NUL bytes")
    return text


def read_bytes(path):
    """The bytes of a file. Raises ValueError for what is none, such as a pipe or a device."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no file")
    return path.read_bytes()


def read_lines(path):
    """The lines of a text file that say something, as `one_line`. Only a line break ends a line."""
    return [one_line(line, path) for line in read_text(path).split("\n") if line.strip()]


def write_text(path, text):
    """A text file (UTF-8), written beside and then renamed: there is the old one, or the new."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with writing(path, beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(text.encode(errors="backslashreplace"))
        os.replace(beside, path)


@contextlib.contextmanager
def writing(path, beside=None):
    """Where a file can't be written, says so in one line, and leaves nothing beside it."""
    try:
        yield
    except OSError as e:
        if beside:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({e.strerror or e}): what was finished before "
                      "is kept, and the same command goes on from there") from e


# ---------------------------------------------------------------- JSON
def parse(text):
    """JSON of any depth, or ValueError."""
    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError("it is too deep") from e


def dump(value, indent=None):
    """Any value as JSON; of its texts, control characters are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return CONTROL.sub(lambda c: f"\\u{ord(c[0]):04x}", text)


def load_json(path):
    """A JSON file, or one clear sentence."""
    try:
        return parse(read_text(path))
    except FileNotFoundError as e:
        raise ValueError(f"{path} is missing: put it there") from e
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is no JSON that can be read ({e})") from e


def write_json(path, value):
    write_text(path, dump(value, indent=2) + "\n")


def the(row, key, kinds, where, default=...):
    """row[key], which is of one of these types (True is no number); of several keys, the first that
    the row has. Else a default, or a ValueError that begins with `where`."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if isinstance(key, tuple):
        key = next((one for one in key if isinstance(row, dict) and one in row), key[-1])
    if isinstance(row, dict) and key not in row and default is not ...:
        return default
    value = row.get(key, ...) if isinstance(row, dict) else ...
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = " or ".join(KINDS[kind] for kind in kinds)
        raise ValueError(f"{where}: expected {key!r} to be {expected}, in {ascii(row)[:60]}")
    return value


# ---------------------------------------------------------------- JSON lines
def read_rows(path, whole=False):
    """The rows of a JSON-lines file, [] where there is none. The beginning of a row, which a kill
    leaves, is forgiven, unless it is to be whole; any other line that is no row is a ValueError."""
    path = Path(path)
    rows = []
    lines = read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n") if path.exists() else []
    for number, line in enumerate(map(bytes.strip, lines), 1):
        if not line.strip(b"\0"):                # blank, or what a loss of power left
            continue
        try:
            row = parse(line)
            if not isinstance(row, dict):
                raise ValueError("expected {name: value}")
            rows.append(row)
        except ValueError as e:
            inner = isinstance(e, json.JSONDecodeError) and e.pos == len(e.doc)     # an inner }
            cut = line.startswith(b"{") and (inner or not line.endswith(b"}"))
            if whole or not cut:
                raise ValueError(f"{path}, line {number}: {e}") from e
    return rows


def append_rows(path, rows):
    """Rows at the end of a JSON-lines file by one write: several processes may add to it, and a
    kill cuts only the last line."""
    new = as_lines(rows).encode(errors="backslashreplace")
    with writing(path), open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":                   # a line was cut: begin a new one
                new = b"\n" + new
        if file.write(new) < len(new):           # of a disk that is nearly full
            raise OSError("No space left on device")


def write_rows(path, rows):
    write_text(path, as_lines(rows))


def as_lines(rows):
    # where they are encoded, what UTF-8 can't hold of a file's name becomes an escape of JSON
    return "".join(dump(row) + "\n" for row in rows)


# ---------------------------------------------------------------- a folder that is one run's
def claim(folder, strange=()):
    """Makes a folder, and makes it this process's own until it ends; of torchrun's processes the
    first holds it for all. ValueError where another run has it, or where it holds files of these
    strange names: somebody's own, that would be overwritten."""
    folder = Path(folder).absolute()
    here = [name for name in strange if (folder / name).exists()]
    if here:
        raise ValueError(f"{folder} holds {', '.join(here)} of no run of ours: choose another "
                         "--out")
    if folder in CLAIMED or rank_and_world()[0] > 0:
        return
    command = shlex.join(["python", *sys.orig_argv[1:]])
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8", errors="backslashreplace")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.seek(0)
        raise ValueError(f"{folder} is in use by {file.read().strip() or 'another run'}: choose "
                         "another --out, or wait") from e
    except OSError as e:                         # of a file system that has no locks
        say(f"{folder} can't be locked ({e.strerror}): let no other run write into it")
    CLAIMED[folder] = file
    with writing(folder):
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()} since {time.ctime()} "
                   f"({command})")
        file.flush()


def same_settings(folder, settings, write=True):
    """Whether settings.json in a folder holds these settings, {name: str}; where there is none it
    is written. Raises ValueError where they differ: a run goes on only as it began."""
    path = Path(folder) / "settings.json"
    if not path.exists():
        if write:
            write_json(path, settings)
        return False
    try:
        before = load_json(path)
        if not isinstance(before, dict):
            raise ValueError(f"{path} holds no settings")
    except ValueError as e:
        raise ValueError(f"{e}: remove it, and the same command goes on with {folder}") from e
    other = [f"{name} was {before.get(name, 'None')}, is {value}"
             for name, value in settings.items() if before.get(name, "None") != value]
    if other:
        raise ValueError(f"{folder} holds a run with other settings ({'; '.join(other)}): choose "
                         "another --out")
    return True


# ---------------------------------------------------------------- fingerprints
def digest(value):
    """A short name of anything that JSON can write."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def fingerprint(path):
    """A short name of what a file, or all files of a folder, hold: of large ones, of their size and
    of many places in them. "" where there is nothing at this path."""
    found = hashlib.blake2b(digest_size=8)
    path = Path(path)
    if (path / "checkpoint.safetensors").exists():           # of finetune.py; the rest is its log
        path = path / "checkpoint.safetensors"
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            size = file.stat().st_size
            found.update(f"{file.relative_to(path)} {size}".encode(errors="surrogateescape"))
            with open(file, "rb") as f:
                for start in range(0, size, max(4096, size // 4096)):
                    f.seek(start)
                    found.update(f.read(4096))
    return found.hexdigest() if path.exists() else ""


def marks(names, known):
    """{"KIND files": fingerprint} of models {kind: name} that are files or folders, and none of the
    known names: as settings hold them beside the names."""
    found = {}
    for kind, name in names.items():
        path = re.sub(r"(?<=\.py):\w+$", "", str(name))
        mark = "" if name is None or name in known else fingerprint(path)
        if mark:
            found[f"{kind} files"] = mark
    return found


def rank_and_world():
    """(this process's number, how many there are), as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@functools.cache
def say(line):
    """A line to stderr: once, and by one process of torchrun's."""
    if rank_and_world()[0] == 0:
        print(visible(line), file=sys.stderr)
