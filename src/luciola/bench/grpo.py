"""GRPO steps of a 0.8M-parameter Llama-style model, 32 prompts x 16 samples: luciola and TRL, same weights and rewards.

A step is a rollout at temperature 1, its rewards, and one update without a reference model. `trl` is set to the same
arithmetic as ours (float32, nothing recomputed, the loss of the paper), the fastest it can be here; `trl-defaults` is
what its users get who leave GRPOConfig as it comes: bfloat16 autocast and activation checkpointing.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

from luciola.bench.turns import Step, compare, machine, take_turns

PEERS = ("trl", "trl-defaults")
SAME_ARITHMETIC: dict[str, Any] = {"bf16": False, "loss_type": "grpo", "gradient_checkpointing": False}
PROMPTS, GROUP, NEW_TOKENS = 32, 16, (5, 64)
ROUNDS, WARMUP = 5, 1

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
    """Seconds a step of both at 5 and at 64 new tokens, and their ratios."""
    from luciola.model.language_model import LanguageModel

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        lm = LanguageModel.create(SHAPE, _tokenizer(), seed=0)
        lm.save(Path(folder) / "model")
        for new_tokens in NEW_TOKENS:
            arguments = {"model": str(Path(folder) / "model"), "new_tokens": new_tokens}
            theirs = arguments | {"settings": SAME_ARITHMETIC if against == "trl" else {}}
            turns = take_turns(
                {"luciola": (f"{__name__}:luciola", arguments), against: (f"{__name__}:trl", theirs)}, ROUNDS, WARMUP
            )
            result |= {f"{name}_at_{new_tokens}_tokens": v for name, v in compare(turns, "luciola", against).items()}
    facts = {"parameters": lm.model.num_parameters(), "prompts": PROMPTS, "samples_a_prompt": GROUP}
    return {**result, **facts, **machine("trl", "transformers")}


def _tokenizer() -> Any:
    import string

    from luciola.text.tokenizer import Tokenizer

    return Tokenizer.characters(string.printable)


def _recipe(model: str, new_tokens: int) -> Any:
    from luciola.recipe import GrpoRecipe

    return GrpoRecipe.model_validate(
        {
            "run": {"name": "bench"},
            "dtype": "float32",
            "task": {"name": "arithmetic"},
            "model": {"path": model},
            "rollout": {"prompts": PROMPTS, "group_size": GROUP, "max_tokens": new_tokens},
            "optim": {"lr": 1e-5},
        }
    )


def luciola(model: str, new_tokens: int) -> Step:
    """A step of our own loop."""
    from luciola import hardware
    from luciola.engine.engine import Engine
    from luciola.model.language_model import load
    from luciola.rl.rollout import rollout
    from luciola.rl.update import update
    from luciola.train.optim import Optimizer

    hardware.keep_freed_memory()
    recipe = _recipe(model, new_tokens)
    lm = load(model)
    assert lm.tokenizer is not None
    tokenizer, engine, optimizer = lm.tokenizer, Engine(lm, dtype="model"), Optimizer(lm.model, recipe.optim)
    numbers = iter(range(10**6))

    def step() -> None:
        number = next(numbers)
        sampled = rollout(engine, tokenizer, recipe, number)
        # Random weights earn nothing, and groups of equal rewards would be left out of the update: give each completion
        # a reward of its own, as the peer's reward function does.
        sampled.rewards_PG = sampled.rewards_PG.new_tensor(
            [[reward(c.text) for c in group] for group in sampled.completions]
        )
        update(lm.model, optimizer, None, sampled, recipe, number, recipe.optim.lr)

    return step


def reward(text: str) -> float:
    """The share of digits in a completion: something that differs between random completions."""
    return sum(c.isdigit() for c in text) / max(1, len(text))


def trl(model: str, new_tokens: int, settings: dict[str, Any]) -> Step:
    """The same with TRL's GRPOTrainer and these `settings`, held between its steps until it is its turn."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]

    recipe = _recipe(model, new_tokens)
    problems = [recipe.task.problem("train", i, 0) for i in range(PROMPTS * 200)]
    rows = [{"prompt": recipe.task.messages(problem)} for problem in problems]
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()

    def rewards(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
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
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=new_tokens,
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

    def step() -> None:
        go.release()
        done.acquire()

    return step
