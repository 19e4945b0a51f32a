"""Forward passes against torch's own attention on random input: both types, causal and not, every head dimension compiled."""

import torch
from aphrodite_flash_attn import flash_attn_func

for dtype in (torch.float16, torch.bfloat16):
    for dim in (32, 64, 96, 128, 160, 192, 224, 256):
        for causal in (False, True):
            q, k, v = (torch.randn(2, 129, 4, dim, device="cuda", dtype=dtype) for _ in range(3))
            wanted = torch.nn.functional.scaled_dot_product_attention(
                *(one.transpose(1, 2).float() for one in (q, k, v)), is_causal=causal
            ).transpose(1, 2)
            torch.testing.assert_close(flash_attn_func(q, k, v, causal=causal).float(), wanted, atol=2e-2, rtol=2e-2)
print("32 forward passes agree with torch")
