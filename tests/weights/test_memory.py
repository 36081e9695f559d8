"""Loading needs the memory of the model and hardly more, converting a small part of it: measured on a gigabyte."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# About a gigabyte in float32; the largest tensor is 3 % of it.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 1536,
    "intermediate_size": 5120,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 128,
}

# Every step is a fork of a process that has imported what it needs, so that none finds memory that another has freed.
# The peak is the most memory since `reset`; mapped pages count.
PROGRAM = """
import json, os, sys, torch
from pathlib import Path
import luciola
from luciola.weights import convert, hf, opening
from luciola.weights.checkpoint import Blank, config_from
from luciola.model.transformer import Transformer

def memory(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))

def reset():
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")

def write(folder, dtype, shard_bytes):
    with Blank(getattr(torch, dtype)):
        model = Transformer(config_from(CONFIG, "config"))
    pattern = torch.randn(4096).mul_(0.02)
    for tensor in model.state_dict().values():
        flat = tensor.detach().view(-1)
        flat.copy_(pattern.to(tensor.dtype).repeat(-(-len(flat) // 4096))[: len(flat)])
    Path(folder).mkdir()
    hf.save(model, Path(folder), shard_bytes=shard_bytes)

def load(path, dtype):
    before = reset()
    lm = luciola.load(path, dtype=dtype, device="cpu")
    peak = memory("VmHWM") - before
    size = sum(tensor.nbytes for tensor in lm.model.parameters())
    kinds = {str(kind) for tensor in lm.model.state_dict().values() for kind in (tensor.dtype, tensor.device)}
    return {"peak": peak, "size": size, "kinds": sorted(kinds)}

def to_gguf(path, destination, kind):
    source = opening.open_checkpoint(path)
    before = reset()
    convert.convert(source, Path(destination), "gguf", kind)
    return {"peak": memory("VmHWM") - before, "size": sum(part.nbytes for part in source.stored.values())}

for name, step in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        print(json.dumps([name, eval(step)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""

STEPS = {
    "write shards": "write('shards', 'float32', 250_000_000)",
    "shards to float32": "load('shards', None)",
    "convert": "to_gguf('shards', 'model.gguf', 'f32')",
    "gguf to float32": "load('model.gguf', None)",
    "gguf to bfloat16": "load('model.gguf', torch.bfloat16)",
    "write one file": "write('single', 'bfloat16', 10 ** 10)",
    "one file to bfloat16": "load('single', 'bfloat16')",
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is reset through Linux's /proc")
def test_peaks(workplace: Path) -> None:
    program = [sys.executable, "-c", f"CONFIG = {CONFIG!r}\n{PROGRAM}", json.dumps(STEPS)]
    try:
        finished = subprocess.run(program, capture_output=True, text=True, check=False)
    finally:
        (workplace / "model.gguf").unlink(missing_ok=True)
        for folder in ("shards", "single"):
            shutil.rmtree(workplace / folder, ignore_errors=True)
    assert finished.returncode == 0, finished.stderr
    report = dict(map(json.loads, finished.stdout.splitlines()))
    for name, found in report.items():
        if found is not None:
            print(f"{name}: {found['peak'] / 1e9:.3f} GB for {found['size'] / 1e9:.3f} GB")
    assert report["convert"]["size"] > 1e9
    assert report["convert"]["peak"] < report["convert"]["size"] / 3
    for name in (name for name in STEPS if " to " in name):
        assert report[name]["peak"] < 1.15 * report[name]["size"], name
        assert report[name]["kinds"] == ["cpu", f"torch.{name.split()[-1]}"]
