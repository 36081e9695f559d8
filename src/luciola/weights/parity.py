"""Does another program compute the same from the same model? Log-probabilities, token by token, and where they part.

    KL(theirs || ours) = sum over tokens of p_theirs (log p_theirs - log p_ours)

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luciola import hardware
from luciola.model.transformer import Transformer
from luciola.weights import hf
from luciola.weights.checkpoint import Checkpoint
from luciola.weights.convert import convert
from luciola.weights.witness import LlamaCpp, transformers_model

SAMPLE = """\
def fib(n: int) -> int:
    return n if n < 2 else fib(n - 1) + fib(n - 2)  # 0, 1, 1, 2, 3, 5

The quick brown fox jumps over 12 lazy dogs; "naïve" prose, isn't it? 你好，世界。深度求索 🤖👩‍💻
"""
TRANSFORMERS_TOKENS, LLAMA_CPP_TOKENS = 512, 64
TOP = 100  # tokens which llama.cpp is asked about at a position; the rest counts as one
DEPARTED = 1e-3  # of a layer's largest value

# Differences, relative to how far log-probabilities lie apart at their position, that rounding explains. llama.cpp
# rounds activations as well where weights are rounded: to half precision, or to eight bits.
BANDS = {"F32": 1e-3, "F64": 1e-3, "F16": 0.02, "BF16": 0.1}
QUANTISED_BAND = 0.25


@dataclass(frozen=True, slots=True)
class Parity:
    """How far two programs are apart. Differences are of log-probabilities, in nats; `relative_difference` is their
    root mean square over that of the log-probabilities themselves, each position taken around its mean."""

    witness: str
    positions: int
    max_difference: float
    mean_difference: float
    relative_difference: float
    max_kl: float
    mean_kl: float
    top1_agreement: float
    first_departure: str | None
    band: float

    @property
    def agrees(self) -> bool:
        """Whether rounding explains all differences: in the end, and in every layer that can be seen."""
        return self.relative_difference <= self.band and self.first_departure is None

    def as_dict(self) -> dict[str, Any]:
        """All figures and the verdict."""
        return {**asdict(self), "agrees": self.agrees}


def tokens_of(checkpoint: Checkpoint, text: str, limit: int) -> list[int]:
    """At most `limit` token ids of `text`, or as many at random for a model without tokenizer; within its context.

    Raises:
        ValueError: fewer than two tokens are left.
    """
    config, tokenizer = checkpoint.config, checkpoint.load_tokenizer()
    limit = min(limit, config.max_position_embeddings)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids: list[int] = torch.randint(config.vocab_size, (min(limit, 64),), generator=generator).tolist()
    else:
        ids = tokenizer.encode(text)[:limit]
    if len(ids) < 2:
        raise ValueError("the text to compare on has fewer than two tokens; give a longer one with --text.")
    return ids


def against_transformers(checkpoint: Checkpoint, text: str = SAMPLE) -> Parity:
    """Compare every log-probability at every position of `text` with transformers' class for the same family.

    What transformers cannot read itself (GGUF, FP8) it gets as a folder that we write.

    Raises:
        ValueError: transformers has no class for this family, or does not load the model.
    """
    ids = tokens_of(checkpoint, text, TRANSFORMERS_TOKENS)
    with _as(checkpoint, "hf") as folder:
        theirs = transformers_model(folder)
    ours = checkpoint.model()
    x_1T = torch.tensor([ids])
    with torch.inference_mode(), _watched(ours) as in_ours, _watched(theirs.model) as in_theirs:
        ours_TV = ours(x_1T)[0].double().log_softmax(-1)
        theirs_TV = theirs(x_1T).logits[0].double().log_softmax(-1)
    departed = (name for name, values in in_ours.items() if _apart(values, in_theirs[name]))
    difference_TV = (ours_TV - theirs_TV).abs()
    kl_T = F.kl_div(ours_TV, theirs_TV, reduction="none", log_target=True).sum(-1).clamp_min(0.0)
    return Parity(
        witness=f"transformers {version('transformers')}",
        positions=len(ids),
        max_difference=float(difference_TV.max()),
        mean_difference=float(difference_TV.mean()),
        relative_difference=_relative(list(zip(ours_TV, theirs_TV, strict=True))),
        max_kl=float(kl_T.max()),
        mean_kl=float(kl_T.mean()),
        top1_agreement=float((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).float().mean()),
        first_departure=next(departed, None),
        band=BANDS["F32"],
    )


def against_llama_cpp(checkpoint: Checkpoint, text: str = SAMPLE) -> Parity:
    """Compare the likeliest tokens' log-probabilities with llama.cpp's, position by position.

    A GGUF file is given to it as it is, anything else as a GGUF file in float32 that we write. What happens inside a
    layer llama.cpp does not tell.

    Raises:
        ValueError: llama.cpp does not load the model, or the model has no tokenizer.
    """
    if checkpoint.load_tokenizer() is None:
        raise ValueError(f"{checkpoint.path} has no tokenizer, without which llama.cpp does not run a model.")
    ids = tokens_of(checkpoint, text, LLAMA_CPP_TOKENS)
    with torch.inference_mode():
        ours_TV = checkpoint.model()(torch.tensor([ids]))[0].double().log_softmax(-1)
    count = min(TOP, checkpoint.config.vocab_size)
    pairs, kls, hits = [], [], 0
    with _as(checkpoint, "gguf") as path, LlamaCpp(path, max(len(ids) + 8, 64), hardware.threads()) as witness:
        for t in range(len(ids)):
            theirs = witness.next_logprobs(ids[: t + 1], count)
            if not theirs:
                continue
            tokens = torch.tensor(list(theirs))
            theirs_k, ours_k = torch.tensor(list(theirs.values()), dtype=torch.float64), ours_TV[t, tokens]
            pairs.append((ours_k, theirs_k))
            kls.append(_kl_of_some(theirs_k, ours_k))
            hits += int(ours_TV[t].argmax() == tokens[theirs_k.argmax()])
    if not pairs:
        raise ValueError("llama.cpp gave no probability at any position of this text; give another one with --text.")
    differences = torch.cat([(ours - theirs).abs() for ours, theirs in pairs])
    kinds = {stored.kind for stored in checkpoint.stored.values()} if checkpoint.format == "gguf" else {"F32"}
    return Parity(
        witness=f"llama.cpp (xllamacpp {version('xllamacpp')})",
        positions=len(pairs),
        max_difference=float(differences.max()),
        mean_difference=float(differences.mean()),
        relative_difference=_relative(pairs),
        max_kl=max(kls),
        mean_kl=sum(kls) / len(kls),
        top1_agreement=hits / len(pairs),
        first_departure=None,
        band=max(BANDS.get(kind, QUANTISED_BAND) for kind in kinds),
    )


def _relative(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Root mean square of ours - theirs over that of theirs, each of a position's values around its mean."""
    difference = torch.cat([ours - ours.mean() - (theirs - theirs.mean()) for ours, theirs in pairs])
    spread = torch.cat([theirs - theirs.mean() for _, theirs in pairs])
    return float(difference.square().mean().sqrt() / spread.square().mean().sqrt().clamp_min(1e-6))


def _kl_of_some(theirs_k: Tensor, ours_k: Tensor) -> float:
    """KL of two distributions known at some tokens, all others taken as one."""
    p, q = theirs_k.double().exp(), ours_k.double().exp()
    rest_p, rest_q = (1 - p.sum()).clamp_min(1e-12), (1 - q.sum()).clamp_min(1e-12)
    kl = (p * (p.log() - q.log())).sum() + rest_p * (rest_p.log() - rest_q.log())
    return max(float(kl), 0.0)


@contextmanager
def _as(checkpoint: Checkpoint, form: str) -> Iterator[Path]:
    """The checkpoint in another program's form: itself, or a temporary float32 copy."""
    plain = form == "gguf" or all(stored.kind != hf.FP8 for stored in checkpoint.stored.values())
    if checkpoint.format == form and plain and not checkpoint.changes:
        yield checkpoint.path
        return
    with tempfile.TemporaryDirectory(prefix="luciola-") as folder:
        copy = Path(folder) / ("model.gguf" if form == "gguf" else "model")
        convert(checkpoint, copy, form, "f32")
        yield copy


@contextmanager
def _watched(model: Transformer | nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects what each layer's attention and feed-forward give out, by name, in the order in which they run."""
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            seen[name] = (output[0] if isinstance(output, tuple) else output).reshape(-1)

        return module.register_forward_hook(note)

    layers = model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    handles = [
        watch(f"layers.{number}.{part}", layer.get_submodule(part))
        for number, layer in enumerate(layers)
        for part in ("self_attn", "mlp")
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _apart(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).abs().max()) > DEPARTED * max(float(theirs.abs().max()), 1e-6)
