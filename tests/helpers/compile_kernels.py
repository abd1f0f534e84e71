"""Compile Triton kernels for GPUs that need not be there: python -m tests.helpers.compile_kernels 80 90."""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffdiscover3d.models import triton_norm

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
KERNELS = ("_sum_moments", "_finish_moments", "_apply", "_sum_gradients", "_finish_gradients", "_apply_gradients")


class Compiling:
    """Stands in for a kernel: a launch compiles it for its arguments and computes nothing.

    Args:
        kernel: compiled by Triton.
        capability: of the GPU, such as 90.
        found: receives the name of the kernel and the size of its machine code in bytes.
    """

    def __init__(self, kernel: triton.JITFunction, capability: int, found: list):
        self.kernel, self.target, self.found = kernel, GPUTarget("cuda", capability, 32), found

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **named) -> None:
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        signature, constants = {}, {}
        for parameter in self.kernel.params:
            value = values.pop(parameter.name)
            signature[parameter.name] = "constexpr" if parameter.is_constexpr else kind(value)
            if parameter.is_constexpr:
                constants[parameter.name] = value
        source = ASTSource(self.kernel, signature, constants)
        compiled = triton.compile(source, target=self.target, options=values)  # the rest are options of the compiler
        self.found.append((self.kernel.__name__, len(compiled.asm["cubin"])))


def kind(value) -> str:
    """The type of an argument in Triton's words."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def main() -> None:
    """Print names and sizes of what was compiled for each GPU: a norm with a shift, and one with a volume added."""
    kernels = {name: getattr(triton_norm, name) for name in KERNELS}
    found: dict[str, list[tuple[str, int]]] = {capability: [] for capability in sys.argv[1:]}
    for capability, sizes in found.items():
        for name, kernel in kernels.items():
            setattr(triton_norm, name, Compiling(kernel, int(capability), sizes))
        for dtype, channels, addend, with_offset in (
            (torch.bfloat16, 40, (2, 40, 1, 1, 1), True),
            (torch.float16, 512, (2, 512, 6, 4, 5), False),
        ):
            x = torch.zeros(2, channels, 6, 4, 5, dtype=dtype).to(memory_format=torch.channels_last_3d).requires_grad_()
            weight, bias, offset = torch.zeros(3, channels)
            added = torch.zeros(addend, dtype=dtype)
            triton_norm.norm_silu(x, weight, bias, 8, 1e-5, added, offset if with_offset else None).sum().backward()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
