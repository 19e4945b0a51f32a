"""Forward and backward on the GPU against the package's plain torch reference, on random inputs."""

import torch
from causal_conv1d import causal_conv1d_fn
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
    x = torch.randn(2, 256, 512, device="cuda", dtype=dtype).requires_grad_()
    weight = torch.randn(256, 4, device="cuda", requires_grad=True)
    bias = torch.randn(256, device="cuda", requires_grad=True)
    found = causal_conv1d_fn(x, weight, bias, activation="silu")
    grads = torch.autograd.grad(found.float().square().sum(), (x, weight, bias))
    expected = causal_conv1d_ref(x, weight, bias, activation="silu")
    references = torch.autograd.grad(expected.float().square().sum(), (x, weight, bias))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for grad, reference in zip(grads, references, strict=True):
        scale = reference.abs().max()
        torch.testing.assert_close(grad / scale, reference / scale, rtol=tolerance, atol=tolerance)
print("causal_conv1d_fn on", torch.cuda.get_device_name(), "agrees with torch, forward and backward")
