"""Two of the engine's own kernels against plain torch on random input."""

import torch
from aphrodite import _custom_ops as ops

x = torch.randn(33, 2 * 512, device="cuda", dtype=torch.float16)
out = torch.empty(33, 512, device="cuda", dtype=torch.float16)
ops.silu_and_mul(out, x)
torch.testing.assert_close(out, torch.nn.functional.silu(x[:, :512]) * x[:, 512:], atol=1e-2, rtol=1e-2)
weight, x = torch.randn(512, device="cuda", dtype=torch.float16), torch.randn(33, 512, device="cuda", dtype=torch.float16)
out = torch.empty_like(x)
ops.rms_norm(out, x, weight, 1e-6)
wanted = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()
torch.testing.assert_close(out.float(), wanted, atol=2e-2, rtol=2e-2)
print("silu_and_mul and rms_norm agree with torch")
