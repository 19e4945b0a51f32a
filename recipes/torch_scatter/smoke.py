"""The CPU half of every operation against plain torch; the CUDA half needs a GPU (smoke_gpu.py)."""

import torch
from torch_scatter import scatter_add, segment_csr

source = torch.arange(12.0).reshape(6, 2)
index = torch.tensor([0, 1, 0, 2, 2, 1])
expected = torch.zeros(3, 2).index_add_(0, index, source)
assert torch.equal(scatter_add(source, index, dim=0), expected)
assert torch.equal(segment_csr(source, torch.tensor([0, 2, 6])), torch.stack([source[:2].sum(0), source[2:].sum(0)]))
print("scatter_add and segment_csr agree with torch")
