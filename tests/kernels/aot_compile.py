"""Compiles every launch of the Triton kernels ahead of time, without a GPU, and prints one JSON object a kernel.

    python aot_compile.py 90 bfloat16 [--all]

The launchers run on meta tensors with ``JITFunction.run`` replaced: what they would launch is compiled for the target
instead, so the configurations are the shipped ones by construction.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from cegate.kernels import (
    _frequency_kernels,
    _low_rank_kernels,
    deformable,
    low_pass,
    residual_norm,
    sum_squared_gradients,
)

_TYPES = {torch.int32: "*i32", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
NUMBER = "fp32"  # how a Python float arrives; see main
_launches: dict[tuple, tuple] = {}


def _record(self, *args, grid, warmup, num_warps=4, num_stages=3, enable_fp_fusion=True, **meta):
    """Stands in for ``JITFunction.run``: keeps the specialisation that the launch would compile."""
    named = dict(zip(self.arg_names, args, strict=False)) | meta
    signature, constants, aligned = {}, {}, []
    for position, parameter in enumerate(self.params):
        value = named[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            aligned.append(position)
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            aligned += [position] * (value % 16 == 0)
        else:
            signature[parameter.name] = NUMBER
    flags = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    key = (self.__name__, tuple(signature.items()), str(constants), tuple(aligned), *flags.values())
    _launches[key] = (self, signature, constants, aligned, flags)


def _run_launchers(dtype: torch.dtype, every: bool) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    shapes = [(4, (32, 32), 1024, 32)]
    if every:
        shapes += [(16, (64, 64), 1024, 32), (2, (37, 19), 768, 16), (1, (128, 128), 384, 32), (1, (5, 32), 48, 64)]
    for batch, grid, channels, d in shapes:
        x, rank = empty(batch, grid[0] * grid[1], channels), 3 * d + 3
        smooth = torch.empty((), device="meta")
        for cutoff in (0.3, smooth) if every else (0.3,):
            kept = low_pass.make_filter(x, grid, cutoff, "official", 0.5)
            low_pass._low_pass_triton(x, grid, kept)
            enter, bias, leave, scale = empty(rank, channels), empty(rank), empty(rank, channels), empty()
            hidden = _frequency_kernels.forward(x, enter, bias, leave, scale, kept, grid, torch.empty_like(x))
            dx, wants = torch.empty_like(x), (torch.float32, True, True, True)
            _frequency_kernels.backward(x, hidden, enter, leave, scale, kept, grid, x, dx, *wants)
    maps = [(64, None, 1024), (64, "gelu", 1024)]
    if every:
        maps += [(8, "relu", 192), (130, None, 768), (256, "gelu", 1024)]
    x = empty(4100, 1024)
    for rank, activation, out in maps:
        down, up, base, dy = empty(rank, 1024), empty(out, rank), empty(4100, 3 * out)[:, :out], empty(4100, out)
        biases = (None, None) if activation is None else (empty(rank), empty(out))
        _, pre = _low_rank_kernels.forward(x, down, up, base, *biases, activation, 0.5)
        dtypes = torch.float32, torch.float32
        _low_rank_kernels.backward(x, pre, down, up, dy, activation, 0.5, dtypes, True, True, True)
        if activation is None:
            down, up, qkv = empty(2 * rank, 1024), empty(2, out, rank), empty(4100, 3 * out)
            pre = _low_rank_kernels.forward_qv(x, down, up, qkv, 0.5)
            _low_rank_kernels.backward_qv(x, pre, down, up, qkv, 0.5, torch.float32, True, True, True)
    for channels in (1024, 192, 4096) if every else (1024,):
        stream, weight = torch.empty(4100, channels, device="meta"), torch.empty(channels, device="meta")
        branch, gradients = stream.to(dtype), (stream, stream.to(dtype))
        residual_norm._forward(stream, branch, weight, weight, weight, 1e-6, dtype)
        residual_norm._backward(stream, *gradients, weight, weight, 1e-6, dtype, True, True)
    for heads, d in ((8, 32), (3, 20)) if every else ((8, 32),):
        values = torch.empty(2, 84, heads, d, device="meta")
        places = torch.empty(2, 84, heads, 3, 4, 2, device="meta")
        table = torch.empty(3, 3, dtype=torch.int32, device="meta")
        deformable._forward(values, places, places[..., 0].contiguous(), table)
        deformable._backward(values, places, places[..., 0].contiguous(), table, values)
    for reduce in (False, True):
        sum_squared_gradients._sum_squared_triton(empty(16, 1025, 1024), empty(16, 1025, 64), reduce)


def _resources(ptx: str, capability: int) -> dict[str, int]:
    """Registers and spilled bytes a thread, as Triton's assembler reports them with its own register allocation.

    Triton 3.9 asks the assembler for a weaker allocation (regAllocOptLevel=2, around a bug of CUDA 13); there some
    kernels keep a few words on the stack that this does not count.
    """
    (architecture,) = re.findall(r"\.target (sm_\w+)", ptx)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,), (spilled,) = re.findall(r"Used (\d+) registers", text), re.findall(r"(\d+) bytes spill stores", text)
    return {"registers": int(registers), "spilled": int(spilled)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--all", action="store_true", help="also the unusual grids, widths and ranks")
    parser.add_argument("--number", default=NUMBER, help="how a Python float arrives: fp32, from a compiler also fp64")
    options = parser.parse_args()
    globals()["NUMBER"] = options.number
    JITFunction.run = _record
    _run_launchers(getattr(torch, options.dtype), options.all)
    target = GPUTarget("cuda", options.capability, 32)
    for function, signature, constants, aligned, flags in _launches.values():
        attributes = {(position,): [["tt.divisibility", 16]] for position in aligned}
        source = ASTSource(function, signature, constants, attributes)
        compiled = triton.compile(source, target=target, options=flags)
        meta = {function.arg_names[at[0]]: value for at, value in constants.items()}
        report = {"kernel": function.__name__, "shared": compiled.metadata.shared, "meta": str(meta), **flags}
        print(json.dumps(report | _resources(compiled.asm["ptx"], options.capability)), flush=True)


if __name__ == "__main__":
    main()
