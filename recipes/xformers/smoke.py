"""The extension registers its operators with torch, with their arguments, and has kernels for CUDA for each; the package's
import does not require it. Three run on the CPU, and one without data. The others need a GPU (smoke_gpu.py)."""

import torch
import xformers
from xformers import _cpp_lib

assert _cpp_lib._cpp_library_load_exception is None, _cpp_lib._cpp_library_load_exception
assert xformers._has_cpp_library
assert _cpp_lib._built_with_cuda
assert _cpp_lib._build_metadata.cuda_version == 1300, _cpp_lib._build_metadata
OPERATORS = {
    "sparse24_largest_mask_2d": 1,
    "sparse24_largest_with_Krandom_mask_2d": 2,
    "sparse24_sparsify_both_ways": 3,
    "sparse24_apply": 3,
    "sparse24_apply_dense_output": 4,
    "_sparse24_gemm": 3,
    "_sparse24_meta_shuffle_test": 2,
    "sparseNM_dense": 4,
    "_sparse24_sm90_cutlass_compress": 1,
    "_sparse24_fp8_sm90_cutlass_gemm": 8,
}
for name, arguments in OPERATORS.items():
    schema = getattr(torch.ops.xformers, name).default._schema
    assert len(schema.arguments) == arguments, schema
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"xformers::{name}", "CUDA"), f"{name} has no kernel for CUDA"
assert tuple(torch.ops.xformers._nvcc_build_version())[:2] == (13, 0)
shapeless = torch.empty(128, 256, dtype=torch.bfloat16, device="meta")
compressed, _ = torch.ops.xformers._sparse24_sm90_cutlass_compress(shapeless)
assert compressed.shape == (128, 128), compressed.shape
# Two of each four values stay; their places are 0 and 1, 2 and 3, 0 and 3, 1 and 2, two bits each.
mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1], [0, 1, 1, 0]]).bool().reshape(16).repeat(32, 2)
packed = torch.ops.xformers._sparse24_pack_mask(mask)
assert packed.tolist() == [[0x9CE4 - 0x10000] * 2] * 32, packed
dense = torch.arange(32 * 32, dtype=torch.int16).reshape(32, 32)  # the type of the values is not looked at
reordered = torch.ops.xformers._sparse24_reorder_meta(packed)
kept = torch.ops.xformers._sparse24_pack_tensor_according_to_mask(dense, reordered)
assert torch.equal(kept, dense[mask].reshape(32, 16)), kept
print(f"{len(OPERATORS)} operators are registered with kernels for CUDA; those for the CPU pack a mask and its values")
