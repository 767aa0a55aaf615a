"""Files that hold all of what was written to them, or what they held before, whatever happens."""
import json
import os


def write_whole(path, write):
    """write(file), so that `path` then holds all of it, or what it held before, whatever happens."""
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the name of an empty file
    os.replace(beside, path)


def whole_lines(path):
    """The lines of a file that is written line by line. A last one that was cut short is cut off."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[:text.rfind(b"\n") + 1]
    if whole != text:
        write_whole(path, lambda file: file.write(whole))
    return whole.decode().split("\n")[:-1]


def made_once(path, about, items, make):
    """[make(item)] of each item, in JSON. The file `path` keeps them: a line that says what it is about, then
    one for each item. What is there is not made again. A generator, so that a progress bar can count them."""
    _, *there = whole_lines(path) or append(path, about)
    for i, item in enumerate(items):
        yield json.loads(there[i] if i < len(there) else append(path, make(item))[0])


def append(path, record):
    """Writes a line of JSON to the end of a file, and returns [the line]."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
    return [json.dumps(record)]
