"""Quantised weights: what they stand for, the kernels that multiply them, llama.cpp's blocks, and whole models."""

import copy
import gc
import weakref
from collections.abc import Iterator

import gguf.quants
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luciola.model.config import ModelConfig
from luciola.model.experts import Experts
from luciola.model.native.linear import Product, formula, linear
from luciola.model.quant import GROUPS, Quantized, quantize
from luciola.model.quant_layers import BOUNDS, QuantExperts, QuantLinear, choose, quantize_model
from luciola.model.transformer import Transformer

GROUPED = ModelConfig(
    model_type="llama",
    vocab_size=300,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
LATENT = ModelConfig(
    vocab_size=300,
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    kv_lora_rank=64,
    q_lora_rank=None,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    num_nextn_predict_layers=1,
    max_position_embeddings=128,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def error(quantized: Quantized, weight: Tensor) -> float:
    return ((quantized.dequantize() - weight).norm() / weight.norm()).item()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("group", GROUPS)
@given(M=st.integers(1, 9), K=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_8_bits_are_right_to_half_a_step(group: int, M: int, K: int, seed: int) -> None:
    w = normal(M, K, seed=seed)
    quantized = quantize(w, 8, group)
    step_MK = quantized.scales.float().repeat_interleave(group, dim=1)[:, :K]
    assert quantized.dequantize().shape == w.shape
    # Rounding the scale to float16 can leave the largest number that much beyond the last step.
    assert ((quantized.dequantize() - w).abs() <= step_MK * 0.5001 + w.abs() * 2**-11).all()


@pytest.mark.parametrize("group", GROUPS)
@given(K=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_4_bits_are_no_worse_than_sixteen_even_steps(group: int, K: int, seed: int) -> None:
    w = normal(5, K, seed=seed)
    error_MK = quantize(w, 4, group).dequantize() - w
    for start in range(0, K, group):
        part, wrong = w[:, start : start + group], error_MK[:, start : start + group]
        filled = torch.cat((part, part[:, -1:].expand(-1, group - part.shape[1])), dim=1)
        low, high = filled.aminmax(dim=1, keepdim=True)
        even = ((filled - low) / (high - low + 1e-30) * 15).round() / 15 * (high - low) + low
        bound = (even - filled).square().sum(1).sqrt() + 1e-3 * filled.abs().amax(1) * group**0.5
        assert (wrong.square().sum(1).sqrt() <= bound).all()


def test_searching_the_range_helps_in_4_bits() -> None:
    """Sixteen even steps from the smallest to the largest of 32 normal numbers are wrong by 0.078."""
    assert error(quantize(normal(256, 1024), 4, 32), normal(256, 1024)) < 0.075


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-3])
def test_constant_matrices_come_back(bits: int, value: float) -> None:
    assert torch.allclose(quantize(torch.full((3, 70), value), bits, 32).dequantize(), torch.tensor(value), rtol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_quantised_comes_back_the_same_the_second_time(bits: int) -> None:
    once = quantize(normal(16, 128), bits, 32).dequantize()
    assert error(quantize(once, bits, 32), once) < 5e-3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", GROUPS)
@given(N=st.integers(1, 40), M=st.integers(1, 40), K=st.integers(1, 1100), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_products_are_those_of_the_dequantised_matrix(bits: int, group: int, N: int, M: int, K: int, seed: int) -> None:
    quantized = quantize(normal(M, K, seed=seed), bits, group)
    w, bias, residual = quantized.dequantize(), normal(M, seed=1), normal(N, M, seed=2)
    for width, options in ((K, {}), (2 * K, {"swiglu": True})):
        x = normal(N, width, seed=3)
        truth = formula(x, w.double(), bias, residual=residual, **options)
        fx = formula(x, torch.eye(K), **options)
        scale = fx.abs() @ w.abs().T + bias.abs() + residual.abs()
        for exact in (False, True):
            y = linear(x, quantized, bias, residual=residual, exact=exact, **options)
            assert ((y - truth).abs() <= 1e-6 * scale + 1e-6).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_take_the_other_way_to_the_same_result(bits: int) -> None:
    quantized, x = quantize(normal(300, 200), bits, 32), normal(400, 200, seed=1)
    assert torch.allclose(linear(x, quantized), linear(x, quantized, exact=True), atol=1e-3)
    assert torch.allclose(linear(x, quantized), formula(x, quantized.dequantize()), atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("M", "K", "group"), [(13, 77, 32), (576, 1536, 64), (2000, 576, 32)])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(bits: int, M: int, K: int, group: int) -> None:
    product, x = Product(quantize(normal(M, K), bits, group)), normal(40, K, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([product(x[i : i + 1]) for i in range(40)])
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for N in range(1, 41):
                assert torch.equal(product(x[40 - N :], exact=True), alone[40 - N :]), (threads, N)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_and_experts_are_views(bits: int) -> None:
    stack = quantize(normal(3, 20, 96), bits, 32)
    one = stack.expert(1)
    assert stack.shape == (3, 20, 96)
    assert torch.equal(one.dequantize(), stack.dequantize()[1])
    assert torch.equal(one.rows(4, 9).dequantize(), one.dequantize()[4:9])
    assert one.rows(4, 9).shape == (5, 96)
    assert one.packed.data_ptr() == stack.packed[1].data_ptr()
    x = normal(2, 96, seed=1)
    assert torch.equal(linear(x, one.rows(4, 9)), linear(x, one)[:, 4:9])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("shape", [(7, 96), (2, 5, 64)])
def test_gguf_blocks_are_kept_without_loss(kind: str, shape: tuple[int, ...]) -> None:
    raw = gguf.quants.quantize(normal(*shape).numpy(), Kind[kind])
    truth = torch.from_numpy(gguf.quants.dequantize(raw, Kind[kind]))
    quantized = Quantized.from_gguf(kind, torch.from_numpy(raw).flatten(), shape)
    assert torch.equal(quantized.dequantize(), truth)
    assert quantized.nbytes <= 1.12 * raw.nbytes  # Q4_0 has no minima of its own


@pytest.mark.parametrize(
    ("bits", "group", "weight", "names"),
    [
        (3, 32, torch.ones(2, 2), "bits=3"),
        (8, 16, torch.ones(2, 2), "group=16"),
        (8, 32, torch.ones(2), "must be a matrix"),
        (4, 32, torch.tensor([[1.0, torch.nan]]), "NaN"),
        (8, 32, torch.tensor([[1e6, 1.0]]), "beyond 65504"),
    ],
)
def test_what_cannot_be_quantised_is_named(bits: int, group: int, weight: Tensor, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        quantize(weight, bits, group)


def test_gguf_of_other_kinds_or_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="Q6_K"):
        Quantized.from_gguf("Q6_K", torch.zeros(210, dtype=torch.uint8), (1, 256))
    with pytest.raises(ValueError, match="33 bytes"):
        Quantized.from_gguf("Q8_0", torch.zeros(33, dtype=torch.uint8), (1, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_dropped_in_for_nn_linear(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 48).to(dtype)
    quantised = QuantLinear(quantize(layer.weight, 8, 32), layer.bias)
    x = normal(2, 3, 64, seed=1).to(dtype)
    y = quantised(x)
    assert y.dtype == dtype
    assert torch.allclose(y.float(), layer(x).float(), atol=0.03)
    twin = copy.deepcopy(quantised)
    assert torch.equal(twin(x), y)
    assert twin.weight.packed.data_ptr() != quantised.weight.packed.data_ptr()
    assert quantised.bfloat16().weight.scales.dtype == torch.float16
    assert torch.equal(quantised(x.bfloat16()).float(), twin.bfloat16()(x.bfloat16()).float())


def test_experts_are_those_of_the_dequantised_stacks() -> None:
    gate_up, down = quantize(normal(4, 64, 96) / 10, 8, 32), quantize(normal(4, 96, 32, seed=1) / 10, 8, 32)
    experts = Experts(4, 96, 32)
    experts.gate_up_proj.copy_(gate_up.dequantize())
    experts.down_proj.copy_(down.dequantize())
    x, weights = normal(9, 96, seed=2), torch.rand(9, 2, generator=seeded(3))
    indices = torch.stack([torch.randperm(4, generator=seeded(i))[:2] for i in range(9)])
    assert torch.allclose(QuantExperts(gate_up, down)(x, weights, indices), experts(x, weights, indices), atol=1e-5)


@pytest.mark.parametrize("group", GROUPS)
def test_normal_weights_get_4_bits_and_long_tails_8(group: int) -> None:
    normal_MK = normal(128, 512)
    tailed_MK = normal_MK / normal(3, 128, 512, seed=1).square().mean(0).sqrt()  # Student's t, 3 degrees of freedom
    for weight, asked, bits in ((normal_MK, 4, 4), (tailed_MK, 4, 8), (normal_MK, 8, 8)):
        quantized, choice = choose("w", weight, asked, group)
        assert quantized is not None
        assert choice.bits == quantized.bits == bits
        assert choice.error == pytest.approx(error(quantized, weight))
        assert choice.error <= BOUNDS[bits][group]
        assert choice.nbytes == quantized.nbytes
    assert error(quantize(tailed_MK, 4, group), tailed_MK) > BOUNDS[4][group]


@pytest.mark.parametrize(
    "weight", [normal(4, 32), normal(1024, 20), normal(256, 256) * 1e-8], ids=["small", "narrow", "tiny"]
)
def test_what_would_save_nothing_or_lose_all_stays_float(weight: Tensor) -> None:
    """The tiny numbers need scales below those that float16 has."""
    quantized, choice = choose("w", weight, 4)
    assert quantized is None
    assert (choice.bits, choice.error, choice.nbytes) == (32, 0.0, weight.nbytes)


@pytest.mark.parametrize("config", [GROUPED, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize(("bits", "bound"), [(8, 0.03), (4, 0.3)])
def test_a_quantised_model_gives_nearly_the_same_logits(config: ModelConfig, bits: int, bound: float) -> None:
    model = Transformer(config)
    model.initialize(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantised, report = quantize_model(model, bits)
    tokens = torch.randint(0, 300, (2, 20), generator=seeded())
    truth, logits = model(tokens), quantised(tokens)
    assert 0 < ((truth - logits).norm() / truth.norm()).item() < bound
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert isinstance(quantised.lm_head, QuantLinear)
    assert torch.equal(quantised.embed_tokens.weight, model.embed_tokens.weight)
    assert {choice.bits for choice in report.choices} <= {bits, 8, 32}
    assert report.nbytes < 0.4 * sum(choice.nbytes_before for choice in report.choices)
    assert "lm_head.weight" in str(report)


def test_the_copy_keeps_nothing_of_the_model_alive() -> None:
    model = Transformer(LATENT)
    model.initialize(0)
    quantised, _ = quantize_model(model, 8)
    kept = [weakref.ref(tensor) for tensor in model.parameters()]
    del model
    gc.collect()
    assert not any(reference() is not None for reference in kept)
    assert quantised(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


def test_quantising_twice_changes_nothing_more() -> None:
    model = Transformer(GROUPED)
    model.initialize(0)
    once, _ = quantize_model(model, 8)
    twice, report = quantize_model(once, 4)
    tokens = torch.zeros(1, 3, dtype=torch.long)
    assert all(choice.bits == 32 for choice in report.choices)  # only what was too small before
    assert torch.equal(once(tokens), twice(tokens))
