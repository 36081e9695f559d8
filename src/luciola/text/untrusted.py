"""Text that came with a model: files read strictly, so that nothing can be taken in two ways, and how a piece of such
text stands in the sentence of an error."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

LONGEST_NAME = 200
MAX_BYTES = 32 << 20  # the largest published one, DeepSeek-V3's index of 91,991 tensors, has 9 MB


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file `path`.

    Raises:
        ValueError: there is no such file, or `read_text` or `parse_json` refuses it.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing or no file; is {path.parent} a model in Hugging Face layout?")
    return parse_json(read_text(path), path)


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """The object in the JSON text of the file `path`.

    Raises:
        ValueError: it is not JSON (in which there is no NaN), it does not hold an object, or a key in it appears twice
            or is not printable.
    """
    try:
        content = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; mend it or fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def read_text(path: Path) -> str:
    """The UTF-8 text in a file.

    Raises:
        ValueError: the file cannot be read, is larger than MAX_BYTES, or is not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path} has more than {MAX_BYTES >> 20} MB, which no such file needs; fetch it again.")
        return path.read_bytes().decode("utf-8")  # which leaves line ends as they are
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); fetch it again.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    for key in found:
        if not key.isprintable():
            raise ValueError(f"the key {key[:80]!r} is not printable")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def is_name(text: str) -> bool:
    """Whether text can be the name of a key or tensor, and stand in the sentence of an error as it is."""
    return text.isprintable() and len(text) <= LONGEST_NAME


def shortened(value: object) -> str:
    """A value from such a file as it can stand in the sentence of an error."""
    try:
        return printable(repr(value), 80)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def printable(text: str, length: int = 200) -> str:
    """Text from elsewhere as it can stand in the sentence of an error: on one line, harmless to a terminal, short."""
    start = "".join(character if character.isprintable() else " " for character in text[: length + 1])
    return start if len(start) <= length else f"{start[: length - 4]} ..."
