"""The kernels compile for the GPUs we name, and ``torch.compile`` takes the operators whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from cegate.kernels._support import HAS_TRITON
from cegate.kernels.frequency_adapter import frequency_adapter
from cegate.kernels.low_pass import low_pass
from cegate.kernels.low_rank import low_rank, low_rank_qv_

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
EVERY = os.environ.get("CEGATE_COMPILE_EVERY") == "1"  # all dtypes, grids, widths and ranks: a quarter of an hour
# bytes a thread: a few words rest in L1 and cost nothing (Triton 3.8 puts one aside, 3.6 and 3.9 none); an array of
# registers in local memory would be hundreds. The unusual sizes may put aside more words
MOST_SPILLED = 64 if EVERY else 16
TARGETS = [(capability, dtype) for dtype in ("bfloat16", "float32", "float16") for capability in SHARED_MEMORY]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(
    ("capability", "dtype"), TARGETS if EVERY else [(80, "bfloat16"), (90, "bfloat16"), (100, "bfloat16")]
)
def test_every_kernel_compiles_and_fits_shared_memory_and_registers(capability, dtype):
    script = Path(__file__).with_name("aot_compile.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), str(capability), dtype, *(["--all"] if EVERY else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if capability == 100 and "is not defined for option 'gpu-name'" in done.stderr:
        pytest.skip("the assembler of this Triton does not know sm_100")
    if capability == 100 and "TritonNvidiaGPUOptimizeTMemLayoutsPass" in done.stderr:
        pytest.skip("a compiler pass of this Triton (seen with 3.6) fails for sm_100")
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({report["kernel"] for report in reports}) == 10
    for report in reports:
        assert report["shared"] <= SHARED_MEMORY[capability], report
        assert report["spilled"] <= MOST_SPILLED, report


def block(x, qkv_weight, maps, experts, cutoff):
    """Every operator once, as a transformer block uses them."""
    qkv = low_rank_qv_(linear(x, qkv_weight), x, *maps)
    y = low_rank(x, maps[0], maps[1], base=x + qkv[..., : x.shape[-1]], activation="gelu", scale=0.1)
    z = frequency_adapter(y[:, 1:], (4, 4), *experts, 0.6)
    return torch.cat([y[:, :1], low_pass(low_pass(z, (4, 4), 0.7), (4, 4), cutoff)], 1).square().mean()


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_block_compiles_without_a_graph_break(where):
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    channels, d, r = 16, 4, 3
    expert_shapes = [(3, d, channels), (3, d), (3, channels, d), (3, channels), (3, channels), (3,), ()]
    x = torch.randn(2, 17, channels, device=where, requires_grad=True)
    maps = [torch.randn(s, device=where, requires_grad=True) for s in [(r, channels), (channels, r)] * 2]
    experts = [torch.randn(s, device=where, requires_grad=True) for s in expert_shapes]
    cutoff = torch.tensor(0.6, device=where, requires_grad=True)
    arguments = (x, torch.randn(3 * channels, channels, device=where), maps, experts, cutoff)
    leaves = [x, *maps, *experts, cutoff]
    # aot_eager: the whole compiler but for the code generator, which needs a C++ compiler and half a minute
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager" if where == "cpu" else "inductor")
    loss, expected = compiled(*arguments), block(*arguments)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, leaves)
    for gradient, eager in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, eager, atol=1e-4, rtol=1e-4)
