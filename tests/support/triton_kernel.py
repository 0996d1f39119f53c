"""A kernel for tests that need one which is not the package's."""

import torch
import triton
import triton.language as tl


@triton.jit
def double_kernel(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, 2 * tl.load(p_x + o))


def double(x: torch.Tensor) -> torch.Tensor:  # x: [N], N a power of two
    y = torch.empty_like(x)
    double_kernel[(1,)](x, y, N=x.numel())
    return y
