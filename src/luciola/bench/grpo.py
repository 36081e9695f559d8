"""GRPO steps of luciola and TRL, same weights and rewards.

Of a 0.8M-parameter Llama-style model, 32 prompts x 16 samples of 5 and of 64 tokens, where what surrounds the
arithmetic counts; and of SmolLM2-135M, 16 x 8 of up to 64 tokens, where the arithmetic does.

A step is a rollout at temperature 1, its rewards, and one update without a reference model. `trl` is set to the same
arithmetic as ours (float32, nothing recomputed, the loss of the paper), the fastest it can be here; `trl-defaults` is
what its users get who leave GRPOConfig as it comes: bfloat16 autocast and activation checkpointing. SmolLM2 ends its
completions itself, so speed is their tokens a second.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from luciola import hardware
from luciola.bench.subjects import SMOLLM2
from luciola.bench.turns import Step, Turn, compare, machine, take_turns
from luciola.model.flops import forward_flops
from luciola.model.language_model import LanguageModel, load

PEERS = ("trl", "trl-defaults")
SAME_ARITHMETIC: dict[str, Any] = {"bf16": False, "loss_type": "grpo", "gradient_checkpointing": False}
WARMUP = 1


class Case(NamedTuple):
    """A size of step, and for how many of them both are timed. TRL takes the update in so many parts, each padded: all
    of SmolLM2's at once would need more memory than a laptop has."""

    prompts: int
    group: int
    new_tokens: int
    rounds: int
    parts: int = 1


SMALL = (Case(32, 16, 5, rounds=5), Case(32, 16, 64, rounds=5))
LARGE = Case(16, 8, 64, rounds=2, parts=8)

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}


def run(against: str = PEERS[0]) -> dict[str, Any]:
    """Seconds a step of both at 5 and at 64 new tokens, and their ratios; of SmolLM2 tokens a second, their ratio and
    the share of the GEMM peak that ours reaches."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        lm = LanguageModel.create(SHAPE, _tokenizer(), seed=0)
        lm.save(small := str(Path(folder, "small")))
        for case in SMALL:
            found = compare(_turns(small, case, against), "luciola", against)
            result |= {f"{name}_at_{case.new_tokens}_tokens": v for name, v in found.items()}
        facts = {
            "parameters": lm.model.num_parameters(),
            "prompts": SMALL[0].prompts,
            "samples_a_prompt": SMALL[0].group,
        }
        lm = load(SMOLLM2)
        lm.save(large := str(Path(folder, "large")))
        result["smollm2"] = rates(_turns(large, LARGE, against), against, lm)
    return {**result, **facts, **machine("trl", "transformers")}


def _turns(model: str, case: Case, against: str) -> dict[str, list[Turn]]:
    ours: dict[str, Any] = {"model": model, "case": case}
    theirs = ours | {"settings": SAME_ARITHMETIC if against == "trl" else {}}
    contenders = {"luciola": (f"{__name__}:luciola", ours), against: (f"{__name__}:trl", theirs)}
    return take_turns(contenders, case.rounds, WARMUP)


def rates(turns: Mapping[str, list[Turn]], against: str, lm: LanguageModel) -> dict[str, Any]:
    """Tokens of completions a second, their ratio turn by turn, and our share of the GEMM peak: a token is read once to
    be sampled and costs three times as much to learn from; a prompt is read once for its group, by either."""
    speeds = {name: [t.said["tokens"] / t.seconds for t in of] for name, of in turns.items()}
    ratios = [a / b for a, b in zip(speeds["luciola"], speeds[against], strict=True)]
    forward, peak = forward_flops(lm.model, LARGE.new_tokens), hardware.gemm_peak("float32")
    shares = [4 * forward * (t.said["tokens"] + t.said["prompt_tokens"]) / t.seconds / peak for t in turns["luciola"]]
    return {
        **{f"{name}_tokens_per_second": statistics.median(speed) for name, speed in speeds.items()},
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "rounds": len(ratios),
        "share_of_peak": statistics.median(shares),
        "gemm_peak_gflops": peak / 1e9,
        "prompts": LARGE.prompts,
        "samples_a_prompt": LARGE.group,
        "new_tokens": LARGE.new_tokens,
    }


def _tokenizer() -> Any:
    import string

    from luciola.text.tokenizer import Tokenizer

    return Tokenizer.characters(string.printable)


def _recipe(model: str, case: Case) -> Any:
    from luciola.recipe import GrpoRecipe

    return GrpoRecipe.model_validate(
        {
            "run": {"name": "bench"},
            "dtype": "float32",
            "task": {"name": "arithmetic"},
            "model": {"path": model},
            "rollout": {"prompts": case.prompts, "group_size": case.group, "max_tokens": case.new_tokens},
            "optim": {"lr": 1e-5},
        }
    )


def luciola(model: str, case: Case) -> Step:
    """A step of our own loop."""
    from luciola.engine.engine import Engine
    from luciola.rl.rollout import rollout
    from luciola.rl.update import update
    from luciola.train.optim import Optimizer

    hardware.keep_freed_memory()
    recipe = _recipe(model, case)
    lm = load(model)
    assert lm.tokenizer is not None
    tokenizer, engine, optimizer = lm.tokenizer, Engine(lm, dtype="model"), Optimizer(lm.model, recipe.optim)
    numbers = iter(range(10**6))

    def step() -> dict[str, int]:
        number = next(numbers)
        sampled = rollout(engine, tokenizer, recipe, number)
        # Random weights earn nothing, and groups of equal rewards would be left out of the update: give each completion
        # a reward of its own, as the peer's reward function does.
        sampled.rewards_PG = sampled.rewards_PG.new_tensor(
            [[reward(c.text) for c in group] for group in sampled.completions]
        )
        update(lm.model, optimizer, None, sampled, recipe, number, recipe.optim.lr)
        written = sum(len(c.token_ids) for group in sampled.completions for c in group)
        return {"tokens": written, "prompt_tokens": sum(map(len, sampled.prompts))}

    return step


def reward(text: str) -> float:
    """The share of digits in a completion: something that differs between random completions."""
    return sum(c.isdigit() for c in text) / max(1, len(text))


def trl(model: str, case: Case, settings: dict[str, Any]) -> Step:
    """The same with TRL's GRPOTrainer and these `settings`, held between its steps until it is its turn."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]

    recipe = _recipe(model, case)
    problems = [recipe.task.problem("train", i, 0) for i in range(case.prompts * 200)]
    rows = [{"prompt": recipe.task.messages(problem)} for problem in problems]
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()

    written = [0]

    def rewards(completions: list[list[dict[str, str]]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        written[0] += sum(map(len, completion_ids))
        return [reward(completion[0]["content"]) for completion in completions]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        reward_funcs=rewards,  # type: ignore[arg-type]
        train_dataset=Dataset.from_list(rows),
        callbacks=[Turns()],
        args=GRPOConfig(
            output_dir=str(Path(model).parent / "trl"),
            use_cpu=True,
            per_device_train_batch_size=case.prompts * case.group // case.parts,
            gradient_accumulation_steps=case.parts,
            num_generations=case.group,
            max_completion_length=case.new_tokens,
            max_steps=10**5,
            learning_rate=recipe.optim.lr,
            beta=0.0,
            logging_steps=10**6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **settings,
        ),
    )
    threading.Thread(target=trainer.train, daemon=True).start()

    def step() -> dict[str, int]:
        written[0] = 0
        go.release()
        done.acquire()
        return {"tokens": written[0]}

    return step
