"""Files that hold all of what was written to them, or what they held before, whatever happens."""
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
