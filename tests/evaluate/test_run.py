"""Evaluation: every figure from scripted completions, the same seed the same numbers, and honest held-out problems."""

from collections.abc import Callable
from typing import Any

import pytest

from luciola.engine.engine import Completion
from luciola.engine.params import SamplingParams
from luciola.evaluate.metrics import wilson_interval
from luciola.evaluate.run import Evaluation, evaluate
from luciola.model.language_model import LanguageModel
from luciola.tasks.arithmetic import Arithmetic
from luciola.tasks.base import Problem, Task
from luciola.tasks.jsonl import Jsonl
from luciola.text.tokenizer import Tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "kv_lora_rank": 8,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "initializer_range": 0.2,
}  # fmt: skip
R1 = "<think>x</think><answer>{}</answer>"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    tokenizer = Tokenizer.characters("0123456789+=? Whatisplumdnec.'CH")
    return LanguageModel.create(SHAPE | {"vocab_size": tokenizer.vocab_size}, tokenizer)


class Scripted:
    """An engine that answers with `texts[problem]`: the greedy one, then the samples. Cut ones end with "..."."""

    def __init__(self, texts: list[list[str]]) -> None:
        self.texts = texts
        self.calls: list[list[SamplingParams]] = []
        self.left = iter(texts)
        self.samples: list[str] = []

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[Completion]]:
        self.calls.append(params)
        return [[self.completion(text) for text in self.next(one)] for one in params]

    def next(self, params: SamplingParams) -> list[str]:
        """The greedy text of the next problem, or the samples of the last one."""
        if params.temperature == 0:
            greedy, *self.samples = next(self.left)
            return [greedy]
        return self.samples

    @staticmethod
    def completion(text: str) -> Completion:
        cut = text.endswith("...")
        return Completion(text, [7] * len(text), "length" if cut else "stop")


def scripted(lm: LanguageModel, answers: Callable[[str], list[str]], problems: int, samples: int) -> Evaluation:
    """An evaluation in which the model says `answers(truth)` to each problem."""
    task = Arithmetic()
    truths = [p.truth for p in held_out(task, problems)]
    engine: Any = Scripted([answers(truth) for truth in truths])
    return evaluate(lm, task, problems=problems, samples=samples, engine=engine)


def held_out(task: Task, count: int, seed: int = 0) -> list[Problem]:
    found = {p.key: p for p in (task.problem("heldout", i, seed) for i in range(count * 2))}
    return list(found.values())[:count]


def test_every_figure_by_hand(lm: LanguageModel) -> None:
    """Three problems of four samples each."""
    scripts = iter(
        [
            lambda t: [R1.format(t), R1.format(t), R1.format(t), R1.format(-1), "hm..."],  # 2 of 4, majority right
            lambda t: [R1.format(-1), R1.format(-1), R1.format(-1), R1.format(t), R1.format(-2)],  # 1 of 4, outvoted
            lambda t: [f"<answer>{t}</answer>", "", "", "no idea", "hm..."],  # none, nobody votes
        ]
    )
    result = scripted(lm, lambda truth: next(scripts)(truth), problems=3, samples=4)
    figures = result.figures
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert (figures["accuracy_low"], figures["accuracy_high"]) == pytest.approx(wilson_interval(2, 3))
    assert figures["pass@1"] == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    assert figures["pass@k"] == pytest.approx(2 / 3)
    assert figures["maj@k"] == pytest.approx(1 / 3)
    assert figures["format_rate"] == pytest.approx(2 / 3)  # greedy only; the third lacks its thinking
    assert figures["truncated"] == 0.0
    assert figures["verdicts"] == {"correct": 5, "wrong": 5, "no_answer": 5, "timeout": 0, "crash": 0}
    texts = [attempt.text for row in result.judged for attempt in row.attempts]
    assert figures["tokens"] == sum(map(len, texts))
    assert figures["mean_length"] == pytest.approx(sum(len(row.greedy.text) for row in result.judged) / 3)
    assert (figures["problems"], figures["samples"]) == (3, 4)
    assert [len(row.attempts) for row in result.judged] == [5, 5, 5]


def test_truncated_answers_are_counted(lm: LanguageModel) -> None:
    result = scripted(lm, lambda truth: ["hm..."], problems=4, samples=0)
    assert result.figures["truncated"] == 1.0
    assert not {"pass@1", "pass@k", "maj@k"} & result.figures.keys()


def test_the_greedy_pass_is_greedy_and_the_samples_have_seeds_of_their_own(lm: LanguageModel) -> None:
    engine: Any = Scripted([["1"] * 3] * 5)
    evaluate(lm, Arithmetic(), problems=5, samples=2, temperature=0.7, top_p=0.9, max_tokens=33, engine=engine)
    (asked,) = engine.calls
    greedy, sampled = asked[::2], asked[1::2]
    assert all((p.temperature, p.n, p.max_tokens) == (0.0, 1, 33) for p in greedy)
    assert all((p.temperature, p.top_p, p.n, p.max_tokens) == (0.7, 0.9, 2, 33) for p in sampled)
    assert len({p.seed for p in sampled}) == 5
    assert None not in {p.seed for p in sampled}


def test_the_same_seed_gives_the_same_numbers(lm: LanguageModel) -> None:
    def texts(seed: int) -> list[list[str]]:
        result = evaluate(lm, Arithmetic(), problems=6, samples=3, max_tokens=8, seed=seed, temperature=1.5)
        return [[row.problem.key, *(attempt.text for attempt in row.attempts)] for row in result.judged]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)


def test_the_first_problems_are_the_same_however_many_are_asked(lm: LanguageModel) -> None:
    """So that a small evaluation during a run and the large one after it agree."""
    small, large = (evaluate(lm, Arithmetic(), problems=n, samples=0, max_tokens=2) for n in (5, 12))
    assert [r.problem for r in small.judged] == [r.problem for r in large.judged[:5]]


def test_held_out_problems_are_different_and_not_those_of_training(lm: LanguageModel) -> None:
    task = Arithmetic(max_value=12)
    result = evaluate(lm, task, problems=1000, samples=0, max_tokens=1)
    keys = [row.problem.key for row in result.judged]
    assert len(set(keys)) == len(keys) < 169  # there are no more: draws without repetition end by themselves
    assert result.figures["problems"] == len(keys)
    trained = {task.problem("train", i, 0).key for i in range(3000)}
    assert not trained & set(keys)
    assert len(trained) + len(keys) == 169  # and together they are all sums of numbers up to 12


def test_a_finite_split_is_asked_whole(lm: LanguageModel, tmp_path: Any) -> None:
    rows = "".join(f'{{"question": "What is {i}+0?", "answer": "{i}"}}\n' for i in range(60))
    (tmp_path / "sums.jsonl").write_text(rows)
    task = Jsonl(path=tmp_path / "sums.jsonl", held_out_fraction=0.3, instruction="")
    size = task.size("heldout")
    assert size is not None
    result = evaluate(lm, task, problems=500, samples=0, max_tokens=1)
    assert len({row.problem.key for row in result.judged}) == result.figures["problems"] == size
    trained = {task.problem("train", i, 0).key for i in range(60 - size)}
    assert not trained & {row.problem.key for row in result.judged}


def test_without_tokenizer_or_problems_there_is_a_sentence(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="has no tokenizer"):
        evaluate(LanguageModel(lm.model), Arithmetic())

    class Empty(Arithmetic):
        def size(self, split: Any) -> int | None:
            return 0

    with pytest.raises(ValueError, match="no held-out problem"):
        evaluate(lm, Empty())
