"""`luciola explain loss` of a pre-training or fine-tuning run: one step taken apart into what each row adds.

The batch is a pure function of (seed, step), and the weights are those of a checkpoint, so the step is one that the run
has made. Its loss is computed twice: by the trainer, and here row by row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from luciola.data.packing import Batch, Rows
from luciola.model.language_model import LanguageModel, load
from luciola.model.logprobs import token_logprobs
from luciola.model.lora import Lora
from luciola.model.transformer import Transformer
from luciola.recipe import PretrainRecipe, SftRecipe, check, read_toml
from luciola.run import Run
from luciola.run.again import last_step, same_loss, standing_at
from luciola.text.tokenizer import Tokenizer
from luciola.train import pretrain, sft, state
from luciola.train.loop import TrainRecipe, forward, train_step
from luciola.train.optim import Optimizer
from luciola.weights.opening import full_name

_BALANCE = {
    "balance_loss": (
        "L_bal",
        "mean over rows of sum_i f_i P_i; f_i = E x the share of the row's choices that fell on expert i of E, "
        "P_i = its mean share of the affinities",
    ),
    "device_balance_loss": ("L_dev", "the same over groups of experts, f and P of a group's experts taken together"),
    "communication_balance_loss": ("L_com", "the same of the tokens that reach each group"),
}


@dataclass(slots=True)
class RowTerms:
    """What a row adds to the loss.

    Attributes:
        text: what is predicted in it; documents: how many stand in it, None where borders do not count.
        tokens, trained: how many the model reads, and how many of its predictions count.
        mean: of - log p over the trained tokens, None where there are none; contribution: their sum / N.
    """

    text: str
    documents: int | None
    tokens: int
    trained: int
    mean: float | None
    contribution: float


@dataclass(slots=True)
class TrainingExplanation:
    """A step taken apart.

    Attributes:
        step: of the run, counted from 1.
        equation: each part of the loss; denominators: the numbers in it.
        loss: the sum of all contributions; trainer_loss: what the trainer computes; logged_loss: what it has logged.
        uniform: the loss of a model that takes every token of its vocabulary for equally likely.
    """

    run: str
    kind: str
    step: int
    equation: dict[str, str]
    denominators: dict[str, int]
    loss: float
    trainer_loss: float
    logged_loss: float | None
    uniform: float
    rows: list[RowTerms] = field(default_factory=list)
    mtp_loss: float | None = None

    @property
    def agrees(self) -> bool:
        """Whether the contributions sum up to the trainer's loss, and that is what was logged."""
        logged = self.logged_loss is None or same_loss(self.trainer_loss, self.logged_loss)
        return logged and same_loss(self.loss, self.trainer_loss)


def explain_training(path: Path, kind: str) -> TrainingExplanation:
    """Take one step of the "pretrain" or "sft" run at `path` apart; the run is left as it is.

    Raises:
        ValueError: the run's recipe, model or data cannot be read any more.
    """
    settings, where = read_toml(path / "recipe.toml"), str(path / "recipe.toml")
    recipe: TrainRecipe
    if kind == "pretrain":
        recipe = check(PretrainRecipe, settings, where=where)
    else:
        recipe = check(SftRecipe, settings, where=where)
    done, logged = last_step(path)
    with standing_at(path, recipe, done) as run:
        lm, lora = _opened(recipe, run)
        assert lm.tokenizer is not None  # without one there were no rows
        optimizer = Optimizer(lm.model, recipe.optim, lora)
        state.restore(run, lm.model, optimizer)
        rows = _data(recipe, lm.tokenizer)
        batches = [rows.batch(done * recipe.accumulate + i) for i in range(recipe.accumulate)]
        targets = sum(batch.targets for batch in batches)
        terms: list[RowTerms] = []
        for again in range(2):  # what is dropped in the step is drawn from its number, and so twice the same
            if lora is not None and lora.section.dropout:
                torch.manual_seed(recipe.seed + (done << 32))
            if again:
                metrics = train_step(lm.model, optimizer, batches, recipe, done)
            else:
                mtp = recipe.mtp_weight > 0
                terms = [row for batch in batches for row in _terms(lm.model, lm.tokenizer, batch, targets, mtp)]
    return TrainingExplanation(
        run=str(path),
        kind=kind,
        step=done + 1,
        equation=_equation(lm.model, recipe),
        denominators={"N": targets, **({"D": len(lm.model.mtp)} if recipe.mtp_weight and lm.model.mtp else {})},
        loss=math.fsum(row.contribution for row in terms),
        trainer_loss=metrics["loss"],
        logged_loss=logged,
        uniform=math.log(lm.config.vocab_size),
        rows=terms,
        mtp_loss=metrics.get("loss/mtp"),
    )


def _opened(recipe: TrainRecipe, run: Run) -> tuple[LanguageModel, Lora | None]:
    """The model as the run began, with its adapters if it trains any."""
    if isinstance(recipe, PretrainRecipe):
        lm = pretrain.build(recipe)
    else:
        assert recipe.model.path is not None  # the recipe's own check
        lm = load(recipe.model.path)
    lm.model.to(getattr(torch, run.dtype))
    lm.model.activation_checkpointing = recipe.activation_checkpointing
    if isinstance(recipe, PretrainRecipe) or recipe.lora is None:
        return lm, None
    assert recipe.model.path is not None
    return lm, Lora(lm.model, recipe.lora, recipe.seed, full_name(recipe.model.path))


def _data(recipe: TrainRecipe, tokenizer: Tokenizer) -> Rows:
    if isinstance(recipe, PretrainRecipe):
        return pretrain.training_rows(recipe, pretrain.documents(recipe, tokenizer))
    return pretrain.training_rows(recipe, sft.conversations(recipe, tokenizer))


def _terms(model: Transformer, tokenizer: Tokenizer, batch: Batch, targets: int, mtp: bool) -> list[RowTerms]:
    tokens_BT, trained_BT, segments_BT = batch
    states_BTD = forward(model, batch, targets, mtp=mtp).states.detach()  # with gradients adapters drop inputs
    found = []
    for b, (tokens_T, trained_T) in enumerate(zip(tokens_BT, trained_BT[:, 1:], strict=True)):
        places = trained_T.nonzero().squeeze(1)
        real = int(places.max()) + 1 if len(places) else 0  # padding lies right of the last trained token
        logp_N = token_logprobs(states_BTD[b, places], model.lm_head.weight.detach(), tokens_T[1:][places])
        found.append(
            RowTerms(
                text=tokenizer.decode(tokens_T[1:][places].tolist()),
                documents=None if segments_BT is None else len(segments_BT[b, : real + 1].unique()),
                tokens=real,
                trained=len(places),
                mean=-float(logp_N.double().mean()) if len(places) else None,
                contribution=-float(logp_N.double().sum()) / targets,
            )
        )
    return found


def _equation(model: Transformer, recipe: TrainRecipe) -> dict[str, str]:
    """Each part of the loss by name, those that are 0 left out; the loss comes last."""
    answers = ", which are those of the assistant" if isinstance(recipe, SftRecipe) else ""
    parts = {"tokens": f"N trained ones in the step{answers}; padding and what cannot be predicted never count"}
    parts["L_main"] = "- 1/N sum over them of log p(token | all before it in its row)"
    loss = ["L_main"]
    if model.mtp and recipe.mtp_weight:
        parts["L_k"] = "the same for the token k + 1 ahead, by MTP module k of D, over the same N"
        loss.append(f"{recipe.mtp_weight:g} / D sum_k L_k")
    for key, (name, meaning) in _BALANCE.items():
        if model.moe_layers and (weight := getattr(recipe, key)):
            parts[name] = meaning
            loss.append(f"{weight:g} sum over layers {name}")
    return parts | {"loss": " + ".join(loss)}
