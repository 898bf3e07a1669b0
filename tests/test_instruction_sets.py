"""The C++ operators on every instruction set and number of threads, as subprocesses where that is chosen at start."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from cegate import native, ops

pytestmark = pytest.mark.skipif(native.EXTENSION is None, reason=native.REASON)

PROGRAM = """
    import sys, torch
    from cegate import native, ops

    def on_threads(threads, dtype):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        x = torch.randn(3, 77, 40).to(dtype)
        results = [ops.low_pass(x, (7, 11), 0.6, backend="cpp")]
        channels = 300
        make = lambda *shape: torch.randn(shape).mul_(0.1).to(dtype).requires_grad_()
        down, up = [(3, 32, channels), (3, 32)], [(3, channels, 32), (3, channels)]
        shapes = [(3, 77, channels), *down, *up, (3, channels), (3,), ()]
        parts = [make(*shape) for shape in shapes]
        results.append(ops.frequency_adapter(parts[0], (7, 11), *parts[1:], 0.6, backend="cpp"))
        low = [make(*shape) for shape in ((1, 5000, channels), (9, channels), (channels, 9), (9,), (channels,))]
        biases = {"down_bias": low[3], "up_bias": low[4]}
        results.append(ops.low_rank(*low[:3], **biases, activation="gelu", backend="cpp"))
        stack = [make(4, 9, channels), make(4, channels, 9)]
        qkv = [make(6, 500, 3 * channels), make(6, 500, channels)]
        mixed = {"adapters": [2, 2, 0, -1, 3, 2], "backend": "cpp"}
        results.append(ops.low_rank(qkv[1], *stack, activation="relu", **mixed))
        results.append(ops.low_rank_qv_(qkv[0].clone(), qkv[1], *stack, *stack, 0.1, **mixed))
        wanted = [*parts, *low, *qkv, *stack]
        results += torch.autograd.grad(sum(y.square().sum() for y in results[1:]), wanted)
        grids = [part.detach() for part in parts]
        results += [*ops.frequency_adapter_factors(grids[0], grids[0], (7, 11), *grids[1:], cutoff=0.6)[:-1]]
        return torch.cat([t.detach().float().flatten() for t in results])

    torch.manual_seed(0)
    shapes = (2, 35, 19), (3, 5, 19), (3, 5), (3, 19, 5), (3, 19), (3, 19), (3,), ()
    tensors = [torch.randn(shape) for shape in shapes]
    # below, at and above a vector, a tile of rows or columns, a pair and a block of the depth
    sizes = [(1, 1, 1, 1), (3, 7, 2, 5), (8, 16, 8, 32), (9, 33, 17, 49), (5, 256, 3, 24), (130, 300, 64, 257)]
    sizes += [(77, 33, 110, 40), (40, 1025, 5, 33)]
    low = [[torch.randn(s) for s in ((1, t, c), (r, c), (o, r), (1, t, o))] for t, c, r, o in sizes]

    def everything(dtype, backend, source):
        own = [part.to(source).to(dtype) for part in tensors]
        found = [ops.frequency_adapter(own[0], (5, 7), *own[1:], 0.9, backend=backend)]
        for own in low:
            x, down, up, base = parts = [part.to(source).to(dtype).requires_grad_() for part in own]
            y = ops.low_rank(x, down, up, base=base, activation="gelu", scale=0.1, backend=backend)
            found += [y, *torch.autograd.grad(y, parts, base)]
        return found

    for dtype, least in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        truth = everything(torch.float64, "torch", dtype)
        found = (everything(dtype, backend, dtype) for backend in ("cpp", "torch"))
        for exact, ours, plain in zip(truth, *found, strict=True):
            error, limit = ((t - exact).abs().max() / exact.abs().max() for t in (ours, plain))
            assert error <= max(2 * limit, least), (dtype, exact.shape, error, limit)
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    threads = {name: [on_threads(n, names[name]) for n in (1, 2, 4)] for name in sys.argv[2:]}
    torch.save({"capability": native.EXTENSION.cpu_capability(), "threads": threads}, sys.argv[1])
"""
# whose matrix products are a BLAS's, which may add up in another order where another thread begins
WITH_BLAS = {"float32": ("portable",), "bfloat16": ("portable", "avx2", "avx512", "amx")}


# on several threads: the dtypes whose loops a set has of its own
DTYPES = {
    "portable": ["float32"],
    "avx2": [],
    "avx512": ["float32", "bfloat16"],
    "avx512_bf16": ["bfloat16"],
    "amx": ["bfloat16"],
}


@pytest.mark.parametrize("isa", DTYPES)
def test_every_instruction_set_computes_the_same_on_any_number_of_threads(isa, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / "found.pt"), *DTYPES[isa]]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CEGATE_CPU": isa})
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "found.pt")
    order = list(DTYPES)
    assert found["capability"] in order[: order.index(isa) + 1]  # the best this CPU has, up to the one asked for
    for dtype in DTYPES[isa]:
        one, *others = found["threads"][dtype]
        assert len(one) > 1000
        eps = torch.finfo(getattr(torch, dtype)).eps
        for other in others:
            first = 3 * 77 * 40  # the low-pass, loops of our own everywhere
            assert torch.equal(one[:first], other[:first])
            if found["capability"] in WITH_BLAS[dtype]:
                assert ((one - other).norm() <= eps * one.norm()).item()
            else:
                assert torch.equal(one, other)


@pytest.mark.parametrize("channels", [1024, 1025, 2500])
def test_a_deep_product_in_bfloat16_is_rounded_once(channels):
    x, down, up = (torch.randn(shape).bfloat16() for shape in ((4, 64, channels), (16, channels), (8, 16)))
    exact = x.double() @ down.double().mT @ up.double().mT
    ours, plain = (
        (ops.low_rank(x, down, up, backend=backend).double() - exact).square().mean().sqrt()
        for backend in ("cpp", "torch")
    )
    assert ours <= 1.1 * plain
