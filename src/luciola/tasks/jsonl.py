"""Problems with reference answers from a JSONL file: GSM8K, MATH, or your own.

    [task]                                 [task]
    name = "jsonl"                         name = "jsonl"
    path = "gsm8k_train.jsonl"             path = "math_train.jsonl"
    answer_after = "####"                  question = "problem"
                                           answer = "solution"
                                           answer_boxed = true
                                           categories = ["type", "level"]

`rows.py` says which rows are held out.
"""

import random
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from luciola.tasks.base import R1_INSTRUCTION, Problem, chat
from luciola.tasks.rows import FileTask, key_of, text_of
from luciola.verify import answer, extract
from luciola.verify.verdict import Verdict


class Jsonl(FileTask):
    """Questions and answers, one JSON object a line."""

    name: Literal["jsonl"] = "jsonl"
    question: str = Field("question", description="the field that holds the question")
    answer: str = Field("answer", description="the field that holds the answer")
    answer_after: str | None = Field(
        None, min_length=1, description="the answer follows the last such mark; GSM8K: ####"
    )
    answer_boxed: bool = Field(False, description="the answer is the content of the last \\boxed{} in its field")
    categories: tuple[str, ...] = Field(
        (), description="fields by which an evaluation breaks its figures down; MATH: type and level"
    )
    instruction: str = Field(R1_INSTRUCTION, description="a system message before every problem; none when empty")

    @model_validator(mode="after")
    def _one_way_to_the_answer(self) -> Self:
        if self.answer_boxed and self.answer_after is not None:
            raise ValueError("answer_after and answer_boxed are two ways to find the answer; give one of them")
        return self

    def parse(self, row: dict[str, Any]) -> Problem:
        if not isinstance(row, dict):
            raise ValueError('a row must be a JSON object, such as {"question": ..., "answer": ...}')
        question, answer_text = text_of(row, self.question), text_of(row, self.answer)
        if self.answer_after is not None:
            _, mark, answer_text = answer_text.rpartition(self.answer_after)
            if not mark:
                raise ValueError(f"the field {self.answer!r} does not contain answer_after = {self.answer_after!r}")
        elif self.answer_boxed:
            boxes = extract.boxes(answer_text)
            if not boxes:
                raise ValueError(f"the field {self.answer!r} has no \\boxed{{}}, which answer_boxed = true asks for")
            answer_text = boxes[-1]
        if not answer_text.strip():
            raise ValueError(f"the field {self.answer!r} holds no answer")
        categories = tuple((name, text_of(row, name).strip()) for name in self.categories)
        return Problem(question.strip(), answer_text.strip(), key_of(question), categories)

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        return chat(problem.prompt, self.instruction)

    def solution(self, problem: Problem, rng: random.Random, error_rate: float = 0.0) -> str:
        raise ValueError(
            "The task 'jsonl' has no worked solutions in the R1 form; train on text with data.source = 'files' instead."
        )

    def grade(self, problem: Problem, completion: str) -> Verdict:
        return answer.grade(completion, problem.truth)
