"""Learning-rate schedules over a known number of steps."""

from __future__ import annotations

import math

from luciola.recipe import OptimSection

STABLE_SHARE = 0.8  # of the steps, before multi-step and wsd come down
LAST_SHARE = 0.9  # multi-step's second jump


def learning_rate(optim: OptimSection, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    A linear warm-up over `optim.warmup_steps`, then, with r = final_lr_ratio:
    constant: lr; linear and cosine: down to r lr over all remaining steps;
    multi-step: lr, sqrt(r) lr from 80 %, r lr from 90 % of the steps (DeepSeek LLM, section 2.3, where r = 0.1);
    wsd: lr until 80 %, then linearly to r lr.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    share = step / max(1, steps)
    after = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    last = optim.final_lr_ratio
    match optim.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 + (last - 1.0) * after
        case "cosine":
            factor = last + (1.0 - last) * (1.0 + math.cos(math.pi * after)) / 2
        case "multi-step":
            factor = 1.0 if share < STABLE_SHARE else math.sqrt(last) if share < LAST_SHARE else last
        case "wsd":
            down = max(0.0, (share - STABLE_SHARE) / (1.0 - STABLE_SHARE))
            factor = 1.0 + (last - 1.0) * down
    return optim.lr * factor
