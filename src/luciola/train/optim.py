"""AdamW over float32 master weights, whatever precision the model computes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luciola.model.lora import Lora
from luciola.recipe import OptimSection


class Optimizer:
    """AdamW with weight decay on matrices only, global gradient clipping, and fp32 masters.

    A float32 model is its own master. For a bfloat16 model the masters are copies: gradients of every micro-batch are
    added up in float32 there, the update happens there, and the result is rounded into the model. Small updates are
    then never lost to rounding. With `lora` the adapters, float32 themselves, are trained instead of the model.
    """

    def __init__(self, model: nn.Module, optim: OptimSection, lora: Lora | None = None) -> None:
        self.optim, self.lora = optim, lora
        trained = model if lora is None else lora
        self.parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in self.parameters.items()
        }
        decayed = [p for p in self.masters.values() if p.ndim >= 2]
        others = [p for p in self.masters.values() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
        )

    def accumulate(self) -> None:
        """Take over the gradients of a micro-batch; call after every backward pass."""
        for name, p in self.parameters.items():
            master = self.masters[name]
            if master is not p and p.grad is not None:
                grad = p.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                p.grad = None

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradients; returns the gradient norm before clipping.

        Where the norm is not finite nothing is updated: the caller decides what to do about it.
        """
        grads = [p.grad for p in self.masters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
        if norm == norm and norm != float("inf"):
            if self.optim.clip_grad_norm and norm > self.optim.clip_grad_norm:
                torch._foreach_mul_(grads, self.optim.clip_grad_norm / (norm + 1e-6))
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self.publish()
        self.adamw.zero_grad()
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's own precision; the model's matrices follow the adapters."""
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])
        if self.lora is not None:
            self.lora.merge()

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, float32, and the step count: all that AdamW remembers."""
        tensors: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            tensors[f"master.{name}"] = master.detach()
            for key, value in self.adamw.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave; the model follows."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            if keys:
                self.adamw.state[master] = {key: tensors[f"{key}.{name}"].clone() for key in keys}
        self.publish()
