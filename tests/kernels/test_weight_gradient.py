import pytest
import torch

from cegate.kernels._support import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from cegate.kernels._weight_gradient import LEAST_TOKENS, weight_gradient


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("images", "tokens"), [(1, 3), (2, LEAST_TOKENS), (3, LEAST_TOKENS + 37)], ids=["one part", "even parts", "uneven"]
)
def test_it_is_one_product_over_all_tokens(images, tokens, transposed, device):
    generator = torch.Generator().manual_seed(0)
    # a padded row, and a slice of wider tokens: the strides that callers have
    narrow = torch.randn(images, tokens, 24, generator=generator).to(device)[..., :20]
    wide = torch.randn(images, tokens, 100, generator=generator).to(device)[..., 10:80]
    ours = weight_gradient(narrow, wide, torch.float32, transposed=transposed)
    exact = torch.einsum("bnr,bnc->rc", narrow.double(), wide.double())
    torch.testing.assert_close((ours.mT if transposed else ours).double(), exact, rtol=1e-5, atol=1e-4)
