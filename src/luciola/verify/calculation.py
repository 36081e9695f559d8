"""Tell an answer from the calculation that would give it, and from one that no algebra system should be asked to do."""

import re

from luciola.verify.spelling import canonical

_COMPUTES = re.compile(
    r"[0-9)}] ?[-+/!]|[*×÷^|]|[-+] ?\(? ?[-+]"  # operators, powers, absolute values, signs of signs
    r"|[0-9)}] ?\([-+]?[0-9.]|\) ?[0-9]|(?<!frac)[0-9]\{"  # a product without a sign
    r"|[a-zA-Z]\(|\\frac.*\\frac"  # a function, a fraction of fractions
    r"|\\(?!(?:frac|[lg]eq?|[lg]t|in|cup|infty|approx|pi|angle|pm|q?quad|[lc]?dots|overline|underline)(?![a-z])"
    r"|text|math|[^a-z])"  # any other command
)
_ORDINAL = re.compile(r"\^ ?\{? ?(?:st|nd|rd|th)(?![a-z])")  # 5^{th}
_TOWER = re.compile(r"[0-9)}] ?(?:\^ ?(?:[({ ]+-?[0-9]+|[0-9])|\*\*[({ ]*[0-9]+) ?(?:\^|\*\*|!)")
_HUGE = re.compile(r"(?:\^|\*\*)[ ({]*-?[0-9]{6}|[0-9]{6}[ )}]*!")
_UNEQUAL = re.compile(r"(?:[<>]|(?<![0-9)}])!)$")  # before an equals sign: <= and !=, but not 5! =
_DEEPEST = 25  # brackets inside brackets; MATH's references have at most 5
GREEK = (  # pi is a number
    "(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|"
    "chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Upsilon|Phi|Psi|Omega)"
)
VARIABLE = rf"(?:[a-zA-Zα-ορ-ωΩ]|\\{GREEK}(?![a-zA-Z]))"
_ARGUMENT = rf"(?:{VARIABLE}|[0-9]+)"
NAME = (  # of what an answer is the value of: x, x_{10}, \theta, f'(x), P(X=2), Area, AB, |AB|, m\angle ABC
    rf"(?:{VARIABLE}'{{0,3}}(?:_\w|_\{{ ?\w+ ?\}})?'{{0,3}}(?:\({_ARGUMENT}(?:, ?{_ARGUMENT})*\))?|P\([^()]+\)"
    r"|[A-Za-z]{3,}(?: [A-Za-z]+)*|m? ?(?:\\(?:angle|triangle|overline) ?)?\{?[A-Z]{2,3}\}?|\|[A-Z]{2}\|)"
)
_NAMED = re.compile(NAME)


def computes(text: str) -> bool:
    """Whether a canonical text that does not read as a number leaves something to be computed: `\\sqrt{144}`, `6+9`."""
    return _COMPUTES.search(_ORDINAL.sub("", text)) is not None


def unreasonable(given: str, asked: str) -> str:
    """What makes an answer too much to compute, so wrong; "" for any other, or if the reference is like that too."""
    for pattern, what in ((_TOWER, "a tower of powers"), (_HUGE, "a power or factorial beyond any reference")):
        if pattern.search(given) and not pattern.search(asked):
            return f"the answer is {what}"
    depth = deepest = 0
    for character in given:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return f"the answer has brackets in brackets, more than {_DEEPEST} deep" if deepest > _DEEPEST else ""


def sides(text: str) -> list[str]:
    """What stands between the equals signs, save those inside brackets, as in `\\sum_{k=1}`, and in `<=`."""
    found, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "=" and depth == 0 and not _UNEQUAL.search(found[-1]):
            found.append("")
        else:
            found[-1] += character
    return found


def values(text: str) -> list[str]:
    """The sides that are not mere names, of `x = 3 + 4 = 7` the last two; a name alone is a value."""
    return [side for side in sides(text) if not _NAMED.fullmatch(canonical(side))] or sides(text)[-1:]
