"""The kernels at both ends of a decoding step give what PyTorch gives."""

import pytest
import torch
import torch.nn.functional as F

from luciola.model.native import build
from luciola.model.native.ends import embed, normed
from luciola.model.norm import RMSNorm

pytestmark = pytest.mark.skipif(build.library() is None, reason=f"no native kernels: {build.reason()}")
WIDTHS = (1, 7, 16, 40, 129)  # less than a vector, whole ones, and what is left over
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the last one has no kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
@torch.no_grad()
def test_embed_reads_the_rows(D: int, dtype: torch.dtype) -> None:
    weight_VD, tokens_N = torch.randn(11, D).to(dtype), torch.tensor([10, 0, 3, 3])
    assert torch.equal(embed(tokens_N, weight_VD), weight_VD[tokens_N].float())


@pytest.mark.parametrize("token", [-1, 11, 2**40])
@torch.no_grad()
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(IndexError, match="outside the vocabulary of 11"):
        embed(torch.tensor([0, token]), torch.randn(11, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
@torch.no_grad()
def test_normed_is_the_norm(D: int, dtype: torch.dtype) -> None:
    norm, x_ND = RMSNorm(D, eps=1e-5), 3 * torch.randn(5, D)
    norm.weight.copy_(torch.randn(D))
    norm.to(dtype)
    expected = F.rms_norm(x_ND.double(), (D,), norm.weight.double(), 1e-5)
    torch.testing.assert_close(normed(x_ND, norm).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(normed(x_ND, norm)[2:3], normed(x_ND[2:3], norm))  # whatever its neighbours are
    strided_ND = x_ND.repeat(1, 2)[:, :D]
    assert torch.equal(normed(strided_ND.contiguous(), norm), normed(x_ND, norm))


@torch.no_grad()
def test_damaged_states_stay_damaged() -> None:
    x_ND = torch.ones(2, 20)
    x_ND[1, 7] = torch.nan
    y_ND = normed(x_ND, RMSNorm(20))
    assert y_ND[0].isfinite().all() and y_ND[1].isnan().all()
