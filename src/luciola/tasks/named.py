"""Tasks by the name that the field gives them: the [task] table which a word of `luciola evaluate` stands for.

| word                                        | problems                                                       |
| ------------------------------------------- | -------------------------------------------------------------- |
| `arithmetic`, `countdown`                   | made up                                                        |
| `gsm8k=FILE`                                | all of GSM8K's JSON lines, the answer after ####               |
| `math=FILE`                                 | all of MATH's, the answer in \\boxed{}, by subject and level    |
| `humaneval`                                 | all of HumanEval's                                             |
| `mbpp=FILE`                                 | those of MBPP's test split, 500                                |
| `jsonl=FILE`                                | all of a file with the fields `question` and `answer`          |
| `programs=FILE`                             | all of a file with the fields `prompt`, and `pairs` or `tests` |
| `reasoning_gym`, `reasoning_gym=NAME,NAME`  | Reasoning Gym's, all or these                                  |

A file that is named here is evaluated as a whole, the rows that training would see included; but MBPP has a
split of its own.
"""

from typing import Any

from luciola.recipe.check import nearest

_OF_FILES: dict[str, dict[str, Any]] = {
    "gsm8k": {"name": "jsonl", "answer_after": "####"},
    "math": {
        "name": "jsonl",
        "question": "problem",
        "answer": "solution",
        "answer_boxed": True,
        "categories": ["type", "level"],
    },
    "jsonl": {"name": "jsonl"},
    "mbpp": {"name": "mbpp"},
    "programs": {"name": "programs"},
}
_MADE_UP = ("arithmetic", "countdown", "humaneval", "reasoning_gym")


def table(word: str) -> dict[str, Any]:
    """The [task] table for a word, such as "gsm8k=test.jsonl".

    Raises:
        ValueError: there is no such task, or it wants a file that the word does not name (or the other way round).
    """
    name, equals, what = word.partition("=")
    known = [*_MADE_UP, *_OF_FILES]
    if name not in known:
        near = nearest(name, known)
        raise ValueError(f"no task {name!r}; " + (f"did you mean {near}?" if near else f"there are {', '.join(known)}"))
    if name in _OF_FILES:
        if not what:
            raise ValueError(f"{name} is read from a file; name it, as in {name}=FILE.jsonl")
        files = {"path": what} if name == "mbpp" else {"path": what, "heldout_path": what}
        return {**_OF_FILES[name], **files}
    if name == "reasoning_gym" and what:
        return {"name": name, "tasks": [task.strip() for task in what.split(",")]}
    if equals:
        raise ValueError(f"{name} takes no file or list after the name; its settings are written task.KEY=VALUE")
    return {"name": name}
