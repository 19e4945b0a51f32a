"""Forward and backward on the GPU against plain torch, on random inputs."""

import torch
from torch_scatter import scatter_add

torch.manual_seed(0)
source = torch.randn(4096, 64, device="cuda", requires_grad=True)
index = torch.randint(0, 100, (4096,), device="cuda")
result = scatter_add(source, index, dim=0, dim_size=100)
expected = torch.zeros(100, 64, device="cuda").index_add_(0, index, source.detach())
torch.testing.assert_close(result.detach(), expected, rtol=1e-4, atol=1e-4)
result.sum().backward()
torch.testing.assert_close(source.grad, torch.ones_like(source))
print("scatter_add on", torch.cuda.get_device_name(), "agrees with torch, forward and backward")
