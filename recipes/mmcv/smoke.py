"""The package loads every entry point of the extension that it uses; the CPU half of some operators gives known results. The
CUDA half needs a GPU (smoke_gpu.py)."""

import torch
from mmcv import _ext
from mmcv.ops import batched_nms, box_iou_rotated, nms, roi_align
from mmcv.ops.info import get_compiler_version, get_compiling_cuda_version

assert len([name for name in dir(_ext) if not name.startswith("_")]) >= 100, "entry points are missing"
assert get_compiling_cuda_version() == "13.0", get_compiling_cuda_version()
assert get_compiler_version().startswith("GCC 12"), get_compiler_version()
boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
scores = torch.tensor([0.8, 0.9, 0.7])
assert nms(boxes, scores, 0.5)[1].tolist() == [1, 2]
assert batched_nms(boxes, scores, torch.tensor([0, 1, 0]), {"type": "nms", "iou_threshold": 0.5})[1].tolist() == [1, 0, 2]
image = torch.arange(64.0).reshape(1, 1, 8, 8)
centre = roi_align(image, torch.tensor([[0.0, 2.0, 2.0, 6.0, 6.0]]), (2, 2), 1.0, 2, "avg", True)
assert torch.allclose(centre[0, 0], torch.tensor([[22.5, 24.5], [38.5, 40.5]])), centre
upright = torch.tensor([[5.0, 5.0, 10.0, 4.0, 0.0]])
turned = torch.tensor([[5.0, 5.0, 4.0, 10.0, torch.pi / 2]])
assert torch.allclose(box_iou_rotated(upright, turned), torch.ones(1, 1), atol=1e-4)
print("mmcv.ops has its entry points; their CPU results are right")
