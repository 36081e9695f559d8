"""References that are no algebra: words, sequences, dates and codes, which are compared as text.

To algebra `no` and `on`, `AL` and `LA`, `H2O` and `O2H` would be equal products of variables, and `1990-1995` and
`1985-1990` equal differences. A reference is text where it is, with nothing but blanks and punctuation besides,

| kind     | what it is                                                                 | examples                    |
| -------- | -------------------------------------------------------------------------- | --------------------------- |
| sequence | capital letters in a row, or numbers or letters with blanks between        | `AL`, `B A C`, `3 2 1`      |
| code     | letters and digits, one of the digits behind a letter                      | `H2O`, `cat2`, `A1 B2`      |
| date     | whole numbers joined by hyphens, or more than two by slashes or full stops | `10-15`, `5/6/2024`         |
| words    | among it a word of three letters, or an English one of two                 | `no`, `June 20`, `cat, dog` |

So `ab`, `2xy` and `xy + 1` stay algebra, and so does what has a function's name in it. Only the case of words is
ignored. Words with commas or "and" between may come in any order.
"""

import re
from collections.abc import Callable
from functools import lru_cache

from luciola.verify.exact import number

NUMBERS = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?(?: [+-]?[0-9]+(?:\.[0-9]+)?)+")
_LETTERS = re.compile(r"[A-Z]{2,}|[A-Z](?: [A-Z])+|[a-z](?: [a-z]){2,}")
_CODE = re.compile(
    r"(?=.*[A-Za-z]_?\{?[0-9])"
    r"(?:[A-Za-z][A-Za-z0-9]*(?: [A-Za-z][A-Za-z0-9]*)*|(?:[A-Z][a-z]?(?:_?[0-9]|_\{[0-9]+\})?){2,})"
)
_DATE = re.compile(r"[0-9]+(?:-[0-9]+)+|[0-9]+(?:/[0-9]+){2,}|[0-9]+(?:\.[0-9]+){2,}")
_PROSE = re.compile(r"[^\W_](?:[^\W_]|[ .,:;'’\"“”!?()&/-])*")
_WORD = re.compile(  # not xyz(x+1), xyz/2 or xyz-1
    r"(?:^|(?<=[ \"“]))(?!(?:and|or)(?!\w))(?:[^\W\d_]{3,}|"
    r"(?i:am|an|as|at|be|by|do|go|he|hi|if|in|is|it|me|my|no|of|on|so|to|up|us|we))"
    r"(?![\w(]|/(?:[0-9]|\w(?!\w))|(?<=[a-z])-(?:[0-9]|[a-z](?![a-z])))"
)
_FUNCTION = re.compile(
    r"(?<![a-zA-Z])(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|pi|inf(?:inity)?|max|min|gcd|lcm|det)"
    r"(?![a-zA-Z])"
)
_CHOICE = re.compile(r"\(?[A-Za-z]\)?")
_IN_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{[^{},]+\}\.?")
_BETWEEN = re.compile(r",? and |[,;] ?")


def same(given: str, asked: str, truth: str) -> bool | None:
    """Whether two canonical texts are equal as text; None where the reference, which `truth` has raw, is algebra."""
    form = _form(asked, truth)
    return None if form is None else form(given) == form(asked)


def words(canonical: str) -> object:
    """What is equal for equal words: whatever their case, and in any order where they are a list."""
    text = canonical.removeprefix("\\{").removesuffix("\\}")
    parts = [text] if text[:1] in ("(", "[") else _BETWEEN.split(text)
    return sorted(part.strip("() .").casefold() for part in parts)


@lru_cache(maxsize=512)  # a group of completions shares its reference
def _form(asked: str, truth: str) -> Callable[[str], object] | None:
    """How to read a text so that it is equal for equal ones, if the reference is text."""
    if NUMBERS.fullmatch(asked):
        return _numbers
    if _DATE.fullmatch(asked):
        return _date
    if _CHOICE.fullmatch(asked) or _IN_TEXT.fullmatch(truth.strip()):
        return words
    if _FUNCTION.search(asked):
        return None
    if _LETTERS.fullmatch(asked):
        return _letters
    if _CODE.fullmatch(asked):
        return _code
    prose = asked.removeprefix("\\{").removesuffix("\\}")
    return words if _PROSE.fullmatch(prose) and _WORD.search(prose) else None


def _numbers(canonical: str) -> object:
    found = [number(part) for part in re.split("[ ,]+", canonical)]
    return None if None in found else found


def _letters(canonical: str) -> object:
    return re.sub(r"[ ,]", "", canonical)


def _code(canonical: str) -> object:
    return re.sub(r"[ _{}]", "", canonical)


def _date(canonical: str) -> object:
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", canonical)
