"""The extension loads and has every entry point; its kernels need a GPU (smoke_gpu.py)."""

from importlib.metadata import version

import flash_attn
import flash_attn_2_cuda
import torch

assert {"fwd", "varlen_fwd", "bwd", "varlen_bwd", "fwd_kvcache"} <= set(dir(flash_attn_2_cuda))
# The builder adds a local version: the gate `wheel` checks the whole of it.
assert version("flash-attn").startswith("2.8.3.post2"), version("flash-attn")
assert flash_attn.__version__ == "2.8.3.post2", flash_attn.__version__
assert torch.version.cuda == "13.0", torch.version.cuda
print("flash_attn_2_cuda has its five entry points")
