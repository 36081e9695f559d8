"""Next-token training: the loop that pre-training and supervised fine-tuning share.

    L = L_main + (mtp_weight / D) sum_k L_k + balance_loss sum over layers L_bal

L_main and each L_k are sums over the step's trained tokens divided by their number in the whole step, however many
batches and padding there are, so that accumulation does not change the result.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luciola import hardware
from luciola.data.packing import Batch, Rows
from luciola.model import balance
from luciola.model.flops import training_flops
from luciola.model.logprobs import token_logprobs
from luciola.model.lora import Lora
from luciola.model.moe import Routing
from luciola.model.transformer import Transformer
from luciola.recipe import PretrainRecipe, SftRecipe
from luciola.run import Run
from luciola.train import state
from luciola.train.optim import Optimizer
from luciola.train.schedule import learning_rate
from luciola.train.stopping import Diverged, stop_on_signal

TrainRecipe = PretrainRecipe | SftRecipe


def fit(
    model: Transformer, rows: Rows, recipe: TrainRecipe, run: Run, description: str, lora: Lora | None = None
) -> float:
    """Train for `recipe.steps` steps, from the run's newest checkpoint if it has one; with `lora` only the adapters.

    Returns the seconds that earlier processes spent on the run, up to that checkpoint.

    Raises KeyboardInterrupt (after saving) when the user stops the run, `Diverged` when a loss or gradient is not
    finite.
    """
    hardware.keep_freed_memory()
    model.activation_checkpointing = recipe.activation_checkpointing
    optimizer = Optimizer(model, recipe.optim, lora)
    started = time.perf_counter()
    start, facts, _ = state.restore(run, model, optimizer)
    earlier: float = facts.get("seconds", 0.0)
    peak = hardware.gemm_peak(run.dtype)
    with stop_on_signal() as stop, run.progress(recipe.steps, description, start) as advance:
        for step in range(start, recipe.steps):
            began = time.perf_counter()
            if lora is not None and lora.section.dropout:
                torch.manual_seed(recipe.seed + (step << 32))  # what is dropped is the same after an interruption
            batches = [rows.batch(step * recipe.accumulate + i) for i in range(recipe.accumulate)]
            metrics = train_step(model, optimizer, batches, recipe, step)
            for name in ("loss", "grad_norm"):
                if not math.isfinite(metrics[name]):
                    raise Diverged(name, metrics[name], step + 1, state.last_checkpoint(run))
            seconds = time.perf_counter() - began
            tokens = sum(int(batch.tokens_BT[:, :-1].numel()) for batch in batches)
            length = max(batch.tokens_BT.shape[1] - 1 for batch in batches)
            flops = tokens * training_flops(model, length, mtp=recipe.mtp_weight > 0)
            metrics |= {
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "mfu": flops / seconds / peak,
                "memory/peak_bytes": hardware.peak_memory_bytes(),
            }
            run.log(step + 1, metrics)
            done, stopping = step + 1, stop.requested  # asked once: who stops has saved
            if done == recipe.steps or stopping or _due(done, recipe.run.checkpoint_every):
                state.save(run, done, model, optimizer, facts={"seconds": earlier + time.perf_counter() - started})
            advance(f"loss {metrics['loss']:.3f}")
            if stopping and done < recipe.steps:
                raise KeyboardInterrupt
    return earlier


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train_step(
    model: Transformer, optimizer: Optimizer, batches: list[Batch], recipe: TrainRecipe, step: int
) -> dict[str, Any]:
    """One optimiser step on the given batches; returns `loss` (main), `loss/mtp`, `lr`, `grad_norm` and expert load."""
    targets = sum(batch.targets for batch in batches)
    if targets == 0:
        raise ValueError(
            f"step {step + 1} has no token to train on: its documents are single tokens, or data.sequence_length = "
            f"{recipe.data.sequence_length} cuts their answers away; raise it"
        )
    main = mtp = 0.0
    loads: list[Tensor] = []
    layers = [*model.moe_layers, *model.mtp_moe_layers] if recipe.mtp_weight else model.moe_layers
    for batch in batches:
        passed = forward(model, batch, targets, mtp=recipe.mtp_weight > 0)
        total = passed.loss
        for loss in passed.mtp_losses:
            total = total + recipe.mtp_weight / len(model.mtp) * loss
        if passed.routings:
            total = total + _balance_loss(model, passed.routings, recipe) / len(batches)
        total.backward()
        optimizer.accumulate()
        main += float(passed.loss.detach())
        mtp += sum(float(loss.detach()) for loss in passed.mtp_losses)
        new = [balance.load(routing, mask) for routing, mask in passed.routings]
        loads = [a + b for a, b in zip(loads, new, strict=True)] if loads else new
    lr = learning_rate(recipe.optim, step, recipe.steps)
    metrics: dict[str, Any] = {"loss": main, "lr": lr, "grad_norm": optimizer.step(lr)}
    if model.mtp and recipe.mtp_weight:
        metrics["loss/mtp"] = mtp / len(model.mtp)
    if loads:
        metrics["expert_load/max_violation"] = max(balance.max_violation(load) for load in loads)
    if recipe.bias_update_speed:
        for layer, load in zip(layers, loads, strict=True):
            if layer.gate.config.topk_method == "noaux_tc" and layer.gate.weight.requires_grad:
                balance.update_bias(layer, load, recipe.bias_update_speed)
    return metrics


def _balance_loss(model: Transformer, routings: list[tuple[Routing, Tensor]], recipe: TrainRecipe) -> Tensor:
    """The balance losses that the recipe weighs, summed over layers."""
    devices, reach = model.config.n_group, model.config.topk_group
    total = routings[0][0].scores_BTE.new_zeros(())
    for routing, real_BT in routings:
        if recipe.balance_loss:
            total = total + recipe.balance_loss * balance.expert_loss([routing], real_BT)
        if recipe.device_balance_loss:
            total = total + recipe.device_balance_loss * balance.device_loss([routing], devices, real_BT)
        if recipe.communication_balance_loss:
            loss = balance.communication_loss([routing], devices, reach, real_BT)
            total = total + recipe.communication_balance_loss * loss
    return total


class Passed(NamedTuple):
    """Final states of a batch, its main and MTP losses as shares of the step's mean, each MoE layer's routing and mask
    of real tokens."""

    states: Tensor
    loss: Tensor
    mtp_losses: list[Tensor]
    routings: list[tuple[Routing, Tensor]]


def forward(model: Transformer, batch: Batch, targets: int, *, mtp: bool) -> Passed:
    """A batch of a step that trains `targets` tokens in all; the MTP modules take part where `mtp` says so."""
    tokens_BT, trained_BT, segments_BT = batch
    inputs = tokens_BT[:, :-1]
    segments = None if segments_BT is None else segments_BT[:, :-1]
    hidden = model.hidden(inputs, segments_BT=segments)
    loss = _cross_entropy(model, hidden.states, tokens_BT[:, 1:], trained_BT[:, 1:], targets)
    # A token counts towards the load if it is real: padding lies right of the last trained token of its row.
    real_BT = trained_BT[:, 1:].flip(1).cummax(1).values.flip(1)
    routings = [(routing, real_BT) for routing in hidden.routings]
    mtp_losses = []
    states = hidden.states
    for depth in range(len(model.mtp) if mtp else 0):
        predicted = model.mtp_hidden(states, inputs, depth, segments)
        ahead, states = depth + 2, predicted.states
        trained = trained_BT[:, ahead:]
        if segments_BT is not None:  # the predicted token must belong to the document it is predicted from
            trained = trained & (segments_BT[:, ahead:] == segments_BT[:, :-ahead])
        normed = model.mtp[depth].norm(states)  # type: ignore[operator]
        mtp_losses.append(_cross_entropy(model, normed, tokens_BT[:, ahead:], trained, targets))
        if predicted.routing is not None:
            routings.append((predicted.routing, real_BT[:, : states.shape[1]]))
    return Passed(hidden.states, loss, mtp_losses, routings)


def _cross_entropy(model: Transformer, states: Tensor, tokens: Tensor, trained: Tensor, targets: int) -> Tensor:
    """- sum of log p over the trained tokens, divided by `targets`."""
    states, tokens, trained = states.flatten(0, 1), tokens.flatten(), trained.flatten()
    if not trained.all():
        places = trained.nonzero().squeeze(1)
        states, tokens = states.index_select(0, places), tokens.index_select(0, places)
    return -token_logprobs(states, model.lm_head.weight, tokens).sum() / targets
