"""llama.cpp, in this process behind its own HTTP server."""

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import xllamacpp


class Server:
    """llama.cpp's server on a free port of this machine, for as long as the object lives."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.verbosity = -1
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.port, params.warmup = 512, 1, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(params)
        # Its loop starts some time after it has begun to answer; let go before that, it would wait for its end forever.
        # A completion is an answer of the loop.
        self.greedy([0], 1)

    def _post(self, path: str, **body: Any) -> Any:
        address, data = self._server.listening_address + path, json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(address, data)) as reply:
            return json.load(reply)

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        ids: list[int] = self._post("/tokenize", content=text, add_special=add_special, parse_special=True)["tokens"]
        return ids

    def detokenize(self, ids: list[int]) -> str:
        text: str = self._post("/detokenize", tokens=ids)["content"]
        return text

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest token, `count` times."""
        ids: list[int] = self._post(
            "/completion", prompt=prompt, n_predict=count, temperature=0, return_tokens=True, ignore_eos=True
        )["tokens"]
        return ids

    def next_logprobs(self, prompt: list[int]) -> dict[int, float]:
        """Log-probabilities of the likeliest ten next tokens; none if the likeliest is no whole character."""
        reply = self._post("/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=10)
        steps = reply.get("completion_probabilities", [])
        return {top["id"]: top["logprob"] for step in steps for top in step["top_logprobs"]}


@pytest.fixture(scope="session")
def llama_cpp() -> type[Server]:
    """`llama_cpp(path)`: llama.cpp's server for a GGUF file."""
    return Server


@pytest.fixture
def llama_cpp_of(tmp_path: Path) -> Callable[[dict[str, Any]], Server]:
    """`llama_cpp_of(metadata)`: the same for a model of one layer of zeros with this `tokenizer.*` metadata."""

    def make(metadata: dict[str, Any]) -> Server:
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
        return Server(path)

    return make
