"""The operators of 2:4 sparsity on the GPU against plain torch: masks, packing, and products for Ampere and for Hopper.

Each tile of a matrix has distinct values, so that its largest ones are defined. The masks must be equal; the products are
compared with the product of the masked dense matrix in single precision.
"""

import itertools

import torch
from xformers.ops.sp24 import sparsify24

OPS = torch.ops.xformers
worst = {}
"By what was compared: the largest error, and the tolerance."


def close(name, found, expected, tolerance):
    """Relative to the largest value."""
    assert found.shape == expected.shape, f"{name}: {found.shape}, not {expected.shape}"
    assert torch.isfinite(found.float()).all(), f"{name}: not finite"
    error = ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest value, allowed are {tolerance:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, tolerance))[0]), tolerance)


def distinct(rows, columns, dtype):
    """Values between -1 and 1, none of them twice in a tile of 4 x 4 or in eight neighbours, nor with the other sign."""
    tiles = torch.rand(rows // 8, columns // 8, 64).argsort(-1).reshape(rows // 8, columns // 8, 8, 8) + 1
    signs = torch.randint(0, 2, tiles.shape) * 2 - 1
    return (tiles * signs / 64).permute(0, 2, 1, 3).reshape(rows, columns).to("cuda", dtype)


def greedy(values):
    """The largest values of each tile of 4 x 4, at most two in each row and in each column."""
    rows, columns = values.shape
    tiles = values.float().cpu().reshape(rows // 4, 4, columns // 4, 4).transpose(1, 2).reshape(-1, 16)
    mask = torch.zeros_like(tiles, dtype=torch.bool)
    in_rows, in_columns = torch.zeros(len(tiles), 4), torch.zeros(len(tiles), 4)
    every = torch.arange(len(tiles))
    for place in tiles.argsort(1, descending=True).T:
        free = (in_rows[every, place // 4] < 2) & (in_columns[every, place % 4] < 2)
        mask[every, place] = free
        in_rows[every, place // 4] += free
        in_columns[every, place % 4] += free
    return mask.reshape(rows // 4, columns // 4, 4, 4).transpose(1, 2).reshape(rows, columns).cuda()


torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
for dtype in (torch.float16, torch.bfloat16):
    x = distinct(256, 512, dtype)
    mask = OPS.sparse24_largest_mask_2d(x) != 0
    close(f"mask of the largest {dtype}", mask, greedy(x), 0)

    sparse = sparsify24(x, algo="largest_values_greedy", backend="cutlass")
    dense = OPS.sparse24_apply_dense_output(x, sparse.threads_masks)
    kept = greedy(x)
    close(f"values that are kept {dtype}", dense, x * kept, 0)
    if torch.cuda.get_device_capability()[0] == 8:  # the kernel of these products refuses other GPUs
        other = torch.randn(512, 384, device="cuda").to(dtype)
        close(f"sparse product {dtype}", sparse @ other, (x * kept).float() @ other.float(), 1e-2)
        across = torch.randn(256, 384, device="cuda").to(dtype)
        close(f"transposed sparse product {dtype}", sparse.t() @ across, (x * kept).float().t() @ across.float(), 1e-2)
    packed, _, packed_t, _ = OPS.sparse24_apply(x, sparse.threads_masks)
    close(f"packed {dtype}", packed, sparse.packed, 0)
    close(f"packed in columns {dtype}", packed_t, sparse.packed_t, 0)

x = distinct(192, 256, torch.bfloat16)
for group, (order, key) in itertools.product((4, 8), (("largest", torch.Tensor.clone), ("largest_abs", torch.abs))):
    groups = key(x.float()).reshape(-1, group)
    expected = torch.zeros_like(groups).scatter_(1, groups.topk(2, 1).indices, 1).reshape(x.shape)
    close(f"2 of {group}, {order}", OPS.sparseNM_dense(x, order, 2, group), x * expected, 0)

if torch.cuda.get_device_capability() == (9, 0):
    values = torch.randn(256, 512, device="cuda")
    pairs = values.abs().reshape(-1, 4)
    values = (values * torch.zeros_like(pairs).scatter_(1, pairs.topk(2, 1).indices, 1).reshape(values.shape)).to(
        torch.float8_e4m3fn
    )
    other = torch.randn(384, 512, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.rand(256, 1, device="cuda") + 0.5, torch.rand(1, 384, device="cuda") + 0.5
    packed, places = OPS._sparse24_sm90_cutlass_compress(values)
    found = OPS._sparse24_fp8_sm90_cutlass_gemm(packed, places, other.t(), a_scale=scales[0], b_scale=scales[1])
    close("sparse product of 8 bits, for Hopper", found, values.float() @ other.float().t() * scales[0] * scales[1], 1e-2)

# The comparison can fail: a matrix from which nothing was removed is another one.
x = distinct(256, 512, torch.float16)
sparse = sparsify24(x, algo="largest_values_greedy", backend="cutlass")
try:
    close("", OPS.sparse24_apply_dense_output(x, sparse.threads_masks), x, 1e-2)
except AssertionError:
    NEGATIVE_CONTROL = "a matrix from which nothing was removed is refused"
    COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
    print(f"{len(worst)} results on {torch.cuda.get_device_name()} agree with torch")
else:
    raise AssertionError("the comparison accepts a dense matrix")
