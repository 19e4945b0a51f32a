"""The reference implementation runs anywhere; the compiled one needs a GPU (smoke_gpu.py)."""

import causal_conv1d_cuda
import torch
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

assert {"causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update"} <= set(dir(causal_conv1d_cuda))
assert torch.version.cuda == "13.0", torch.version.cuda
x, weight = torch.arange(8.0).reshape(1, 1, 8), torch.ones(1, 4)
assert causal_conv1d_ref(x, weight)[0, 0].tolist() == [0, 1, 3, 6, 10, 14, 18, 22]
print("causal_conv1d_cuda has its entry points; the reference convolution is right")
