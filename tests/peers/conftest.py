"""llama.cpp, in a process of its own behind its own HTTP server."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from luciola.weights.witness import LlamaCpp

Serve = Callable[[Path], LlamaCpp]


@pytest.fixture
def llama_cpp() -> Iterator[Serve]:
    """`llama_cpp(path)`: llama.cpp's server for a GGUF file, until the test ends."""
    with ExitStack() as running:
        yield lambda path: running.enter_context(LlamaCpp(path))


@pytest.fixture
def llama_cpp_of(tmp_path: Path, llama_cpp: Serve) -> Callable[[dict[str, Any]], LlamaCpp]:
    """`llama_cpp_of(metadata)`: the same for a model of one layer of zeros with this `tokenizer.*` metadata."""

    def make(metadata: dict[str, Any]) -> LlamaCpp:
        rows, width = len(metadata["tokenizer.ggml.tokens"]), 32
        path = tmp_path / "tokens.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_context_length(512)
        writer.add_embedding_length(width)
        writer.add_feed_forward_length(width)
        writer.add_head_count(1)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        for key, value in metadata.items():
            add[type(value)](key, value)
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        shapes = {f"blk.0.{name}": (width, width) for name in names}
        shapes |= {"token_embd": (rows, width), "output_norm": (width,)}
        shapes |= {"blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return llama_cpp(path)

    return make
