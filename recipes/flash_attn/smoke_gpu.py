"""Forward passes against torch's own attention in float32 on random input; this fork has no backward.

Both types, causal and not, every head dimension compiled, one query head per key head and four, and sequences without padding.
"""

import torch
from aphrodite_flash_attn import flash_attn_func, flash_attn_varlen_func


def expected(q, k, v, causal):
    """(batch, length, heads, dim), queries as many as keys."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    wide = (tensor.transpose(1, 2).float() for tensor in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=causal).transpose(1, 2)


torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cuda.enable_flash_sdp(False)  # torch's own copy of the same kernels
count = 0
for dtype, tolerance in ((torch.float16, 5e-3), (torch.bfloat16, 2e-2)):
    for dim in (32, 64, 96, 128, 160, 192, 224, 256):
        for causal in (False, True):
            for heads in (2, 8):
                q = torch.randn(2, 129, heads, dim, device="cuda", dtype=dtype)
                k, v = (torch.randn(2, 129, 2, dim, device="cuda", dtype=dtype) for _ in range(2))
                found, wanted = flash_attn_func(q, k, v, causal=causal).float(), expected(q, k, v, causal)
                torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
                assert not torch.allclose(found, expected(q, k, v, not causal), atol=tolerance, rtol=tolerance), "any mask"
                count += 1
            starts = torch.tensor([0, 57, 258], device="cuda", dtype=torch.int32)
            q, k, v = (torch.randn(258, 4, dim, device="cuda", dtype=dtype) for _ in range(3))
            found = flash_attn_varlen_func(q, k, v, starts, starts, 201, 201, causal=causal).float()
            for first, last in ((0, 57), (57, 258)):
                wanted = expected(*(tensor[None, first:last] for tensor in (q, k, v)), causal)[0]
                torch.testing.assert_close(found[first:last], wanted, atol=tolerance, rtol=tolerance)
            count += 1
print(f"{count} forward passes on {torch.cuda.get_device_name()} agree with torch")
