"""Rotary embedding against its definition, DeepSeek's weight layout, and the stretched forms at their known values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luciola.model.config import ModelConfig, RopeScaling
from luciola.model.language_model import LanguageModel
from luciola.model.rope import Rope, Rotation, frequencies, rotate

V3_YARN = {"rope_type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}


def config(**changes: object) -> ModelConfig:
    """MLA with the head widths of V2 and V3, everything else tiny."""
    sizes = {
        "vocab_size": 19,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    widths = {"kv_lora_rank": 8, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    return ModelConfig.model_validate(sizes | widths | changes)


def yarn(**changes: object) -> ModelConfig:
    return config(rope_scaling=V3_YARN | changes)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 300), st.booleans())
@settings(max_examples=40, deadline=None)
def test_scores_depend_on_the_distance_of_positions_only(i: int, j: int, shift: int, interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 64, generator=generator) for _ in range(2))
    rope = Rope(config())

    def score(i: int, j: int) -> torch.Tensor:
        at = lambda p: rope(p + 1, q.device, torch.tensor([[p]]))  # noqa: E731
        return (rotate(q, at(i), interleaved) * rotate(k, at(j), interleaved)).sum()

    torch.testing.assert_close(score(i + shift, j + shift), score(i, j), atol=2e-3, rtol=0)


def test_interleaved_pairs_are_complex_numbers_turned_by_the_angle() -> None:
    """The form of DeepSeek's own code."""
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(5.0)[:, None] * frequencies(config())[0]
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(5, 32), angles)
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(rotate(x, Rotation(angles.cos(), angles.sin()), True), expected)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_gradients_and_odd_slices(interleaved: bool, start: int) -> None:
    """Rotary features are a slice of a head that may begin and repeat at odd addresses."""
    x = torch.randn(2, 3, 4, start + 6, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(4.0)[:, None] * torch.tensor([1.0, 0.5, 0.1])
    rotation = Rotation(angles.cos(), angles.sin())
    part = x[..., start:].requires_grad_()
    turned = rotate(part, rotation, interleaved)
    torch.testing.assert_close(turned, rotate(part.detach().clone(), rotation, interleaved))
    torch.testing.assert_close(turned.norm(), part.norm())
    # The map is orthogonal, so the gradient of <g, turn(x)> is g turned back, and <g, turn(x)> = <turn(g) back, x>.
    g = torch.randn(turned.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(turned, part, g)
    torch.testing.assert_close((gradient * part).sum(), (g * turned).sum())
    torch.testing.assert_close(rotate(gradient, rotation, interleaved), g)


@pytest.mark.parametrize("q_lora_rank", [None, 6])
def test_permuted_weights_turn_the_interleaved_layout_into_half_split(q_lora_rank: int | None) -> None:
    """What a converter does: rope rows 0, 2, 4 ... before 1, 3, 5 ... in every head of q and in the shared key."""
    ours = LanguageModel.create(config(q_lora_rank=q_lora_rank, initializer_range=0.3)).model
    theirs = LanguageModel.create(config(q_lora_rank=q_lora_rank, initializer_range=0.3, rope_interleave=False)).model
    order = [*range(0, 64, 2), *range(1, 64, 2)]
    state = ours.state_dict()
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "q_b_proj.weight")):
            heads = tensor.unflatten(0, (2, 192))
            state[name] = torch.cat((heads[:, :128], heads[:, 128:][:, order]), dim=1).flatten(0, 1)
        elif name.endswith("kv_a_proj_with_mqa.weight"):
            state[name] = torch.cat((tensor[:8], tensor[8:][order]))
    tokens = torch.randint(0, 19, (2, 30), generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(theirs(tokens), ours(tokens), atol=1e-2)
    theirs.load_state_dict(state)
    torch.testing.assert_close(theirs(tokens), ours(tokens), atol=1e-5, rtol=0)


def test_yarn_has_the_frequencies_of_v3() -> None:
    f, factor = frequencies(yarn(mscale=1.0, mscale_all_dim=1.0))
    assert factor == 1.0
    known = {0: 1.0, 10: 5.623413e-2, 11: 3.900693e-2, 16: 5.5e-3, 22: 1.778279e-4, 23: 3.333803e-5, 31: 3.333804e-6}
    for k, value in known.items():
        assert float(f[k]) == pytest.approx(value, rel=2e-6), k


@pytest.mark.parametrize(
    ("model", "scale"),
    [
        (config(), 0.0721688),
        (yarn(mscale=1.0, mscale_all_dim=1.0), 0.1352338),  # V3
        (yarn(mscale=0.707, mscale_all_dim=0.707), 0.1147214),  # V2 and V2-Lite
        (yarn(mscale=1.0), 0.0721688),  # without mscale_all_dim the temperature is on cosine and sine instead
    ],
)
def test_attention_scale_of_the_published_models(model: ModelConfig, scale: float) -> None:
    assert model.attention_scale == pytest.approx(scale, abs=5e-8)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        ({"mscale": 1.0}, 1.368888),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.707}, 1.368888 / 1.260804),
        ({"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 0.5}, 0.5),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_scales_cosine_and_sine(scaling: dict[str, float], factor: float) -> None:
    model = yarn(**scaling)
    assert frequencies(model)[1] == pytest.approx(factor, abs=1e-6)
    assert float(Rope(model)(1, torch.device("cpu")).cos[0, 0]) == pytest.approx(factor, abs=1e-6)


def test_linear_scaling_divides_every_position() -> None:
    scaled = Rope(config(rope_scaling={"rope_type": "linear", "factor": 4.0}))(41, torch.device("cpu"))
    plain = Rope(config())(41, torch.device("cpu"))
    torch.testing.assert_close(scaled.cos[40], plain.cos[10])
    torch.testing.assert_close(scaled.sin[40], plain.sin[10])


def test_llama3_leaves_fast_frequencies_and_divides_slow_ones() -> None:
    scaling = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)
    plain, scaled = frequencies(config())[0], frequencies(config(rope_scaling=scaling))[0]
    wavelength = 2 * torch.pi / plain
    torch.testing.assert_close(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    torch.testing.assert_close(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength >= 8192 / 4) & (wavelength <= 8192)
    assert bool(between.any())
    assert bool(((scaled <= plain) & (scaled >= plain / 8))[between].all())


def test_the_table_grows_without_changing_and_stays_float32() -> None:
    rope = Rope(config())
    with torch.inference_mode():
        short = rope(7, torch.device("cpu"))
        long = rope(1000, torch.device("cpu"))
    assert torch.equal(short.cos, long.cos[:7])
    assert torch.equal(short.sin, long.sin[:7])
    assert long.cos.dtype == torch.float32
    assert not long.cos.is_inference()  # a table made while generating must serve training
    positions = torch.tensor([[3, 999], [0, 12]])
    assert torch.equal(rope(1000, torch.device("cpu"), positions).sin, long.sin[positions])
