"""Operators on the GPU against plain torch, on random inputs: deformable convolutions, attention, regions, boxes, points.

Convolutions, attention, regions and the focal loss forward and backward, in single precision against double precision. The
others return indices or counts, which are compared by the distances or as they are.
"""

import torch
from mmcv.ops import (
    ball_query,
    bbox_overlaps,
    box_iou_rotated,
    deform_conv2d,
    furthest_point_sample,
    knn,
    modulated_deform_conv2d,
    nms,
    roi_align,
    sigmoid_focal_loss,
    three_nn,
)
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
from torch.nn import functional

TOLERANCE = 2e-5
worst = {}
"By what was compared: the largest error, and the tolerance."


def close(name, found, expected, tolerance=TOLERANCE):
    """Relative to the largest value."""
    assert found.shape == expected.shape, f"{name}: {found.shape}, not {expected.shape}"
    assert torch.isfinite(found).all(), f"{name}: not finite"
    error = ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    assert error <= tolerance, f"{name}: off by {error:.2e} of the largest value, allowed are {tolerance:.0e}"
    worst[name] = (max(error, worst.get(name, (0.0, tolerance))[0]), tolerance)


def compare(name, function, reference, inputs):
    """Results and gradients of both, the reference's in double precision."""
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = function(*inputs), reference(*wide)
    close(name, found, expected)
    gradient = torch.randn_like(found)
    results = torch.autograd.grad(found, inputs, gradient)
    references = torch.autograd.grad(expected, wide, gradient.double())
    for result, exact in zip(results, references, strict=True):
        close(f"{name}, gradients", result, exact, 10 * TOLERANCE)


def leaf(*shape, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).requires_grad_()


def sampled(image, x, y, padding):
    """Values between the pixels; x and y of shape (batch, height, width) count pixels from the first one's centre."""
    height, width = image.shape[-2:]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
    return functional.grid_sample(image, grid, mode="bilinear", padding_mode=padding, align_corners=True)


def deformed(image, offset, mask, weight, bias):
    """A convolution of 3 x 3 with a padding of 1, each tap of which is moved by `offset` and multiplied by `mask`."""
    batch, _, height, width = image.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = rows.to(image)[None].expand(batch, -1, -1), columns.to(image)[None].expand(batch, -1, -1)
    result = bias[:, None, None]
    for tap in range(9):
        y = rows + tap // 3 - 1 + offset[:, 2 * tap]
        x = columns + tap % 3 - 1 + offset[:, 2 * tap + 1]
        values = sampled(image, x, y, "zeros") * mask[:, tap : tap + 1]
        result = result + torch.einsum("oc,bchw->bohw", weight[:, :, tap // 3, tap % 3], values)
    return result


def aligned(image, regions, size=4, samples=2):
    """The mean of samples x samples values in each of the size x size cells of a region."""
    results = []
    steps = (torch.arange(size * samples, device="cuda") + 0.5) / (size * samples)
    for number, left, top, right, bottom in regions.tolist():
        x, y = left - 0.5 + steps * (right - left), top - 0.5 + steps * (bottom - top)
        y, x = torch.meshgrid(y, x, indexing="ij")
        values = sampled(image[int(number)][None], x[None].to(image), y[None].to(image), "border")
        results.append(functional.avg_pool2d(values, samples))
    return torch.cat(results)


def focal(scores, labels, gamma=2.0, alpha=0.25):
    one = functional.one_hot(labels, scores.shape[1] + 1)[:, :-1]  # the last label is the background
    p = scores.sigmoid()
    return -(one * alpha * (1 - p) ** gamma * p.log() + (1 - one) * (1 - alpha) * p**gamma * (1 - p).log())


def overlaps(first, second):
    lower = torch.maximum(first[:, None, :2], second[None, :, :2])
    upper = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    both = (upper - lower).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    return both / (areas[0][:, None] + areas[1][None] - both)


def kept(boxes, scores, limit):
    table, left, result = overlaps(boxes, boxes), scores.argsort(descending=True).tolist(), []
    while left:
        result.append(left[0])
        left = [other for other in left[1:] if table[result[-1], other] <= limit]
    return torch.tensor(result, device="cuda")


torch.manual_seed(0)
image, weight, bias = leaf(2, 8, 13, 17), leaf(6, 8, 3, 3), leaf(6)
offset, mask = leaf(2, 18, 13, 17, scale=1.5), torch.rand(2, 9, 13, 17, device="cuda").requires_grad_()
compare(
    "modulated_deform_conv2d",
    lambda *tensors: modulated_deform_conv2d(*tensors, 1, 1, 1, 1, 1),
    deformed,
    [image, offset, mask, weight, bias],
)
every, none = torch.ones_like(mask).double(), torch.zeros(6, device="cuda", dtype=torch.double)
compare(
    "deform_conv2d",
    lambda image, offset, weight: deform_conv2d(image, offset, weight, 1, 1, 1, 1, 1),
    lambda image, offset, weight: deformed(image, offset, every, weight, none),
    [image, offset, weight],
)
corners = torch.rand(20, 2, device="cuda") * 6 + 1
sizes = torch.rand(20, 2, device="cuda") * 4 + 1
regions = torch.cat([torch.arange(20, device="cuda")[:, None] % 2, corners, corners + sizes], 1)
compare(
    "roi_align",
    lambda image: roi_align(image, regions, (4, 4), 1.0, 2, "avg", True),
    lambda image: aligned(image, regions),
    [image],
)
labels = torch.randint(0, 11, (500,), device="cuda")
compare(
    "sigmoid_focal_loss",
    lambda scores: sigmoid_focal_loss(scores, labels, 2.0, 0.25, None, "none"),
    lambda scores: focal(scores, labels),
    [leaf(500, 10)],
)
shapes = torch.tensor([[12, 9], [6, 5]], device="cuda")
starts = torch.tensor([0, 108], device="cuda")
where = torch.rand(2, 50, 4, 2, 3, 2, device="cuda").requires_grad_()
compare(
    "multi-scale deformable attention",
    lambda *tensors: MultiScaleDeformableAttnFunction.apply(tensors[0], shapes, starts, *tensors[1:], 64),
    lambda *tensors: multi_scale_deformable_attn_pytorch(tensors[0], shapes, *tensors[1:]),
    [leaf(2, 138, 4, 8), where, leaf(2, 50, 4, 2, 3)],
)

boxes = torch.rand(400, 2, device="cuda") * 50
boxes = torch.cat([boxes, boxes + torch.rand(400, 2, device="cuda") * 20 + 1], 1)
scores = torch.randperm(400, device="cuda").float()
assert torch.equal(nms(boxes, scores, 0.3)[1], kept(boxes, scores, 0.3)), "nms keeps other boxes"
close("bbox_overlaps", bbox_overlaps(boxes, boxes[:90]), overlaps(boxes.double(), boxes[:90].double()))
middle, lengths = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
upright = torch.cat([middle, lengths, torch.zeros(400, 1, device="cuda")], 1)
turned = torch.cat([middle, lengths.flip(1), torch.full((400, 1), torch.pi / 2, device="cuda")], 1)
close("box_iou_rotated", box_iou_rotated(upright, turned[:90]), overlaps(boxes.double(), boxes[:90].double()), 1e-3)

points, centres = torch.randn(2, 500, 3, device="cuda"), torch.randn(2, 60, 3, device="cuda")
table = torch.cdist(centres.double(), points.double())
distances, _ = three_nn(centres, points)
nearest = table.topk(8, largest=False).values
close("three_nn", distances, nearest[..., :3])
close("knn", table.gather(2, knn(8, points, centres).transpose(1, 2).long()).sort(-1).values, nearest)
found = ball_query(0.0, 0.8, 128, points, centres).long()
inside = torch.zeros_like(table, dtype=torch.bool).scatter_(2, found, True)
crowded = (table < 0.8).sum(-1) > 0  # others get point 0
assert torch.equal(inside[crowded], (table < 0.8)[crowded]), "ball_query finds other points"
chosen = furthest_point_sample(points, 40).long()
for sequence, order in zip(points.double(), chosen, strict=True):
    for number in range(1, 40):
        apart = torch.cdist(sequence, sequence[order[:number]]).min(1).values
        assert apart[order[number]] >= apart.max() * (1 - 1e-6), "furthest_point_sample chooses a nearer point"

# The comparison can fail: a deformable convolution with other offsets is another one.
try:
    close("", modulated_deform_conv2d(image, offset, mask, weight, bias, 1, 1), deformed(image, -offset, mask, weight, bias))
except AssertionError:
    NEGATIVE_CONTROL = "a convolution with the opposite offsets is refused"
    COMPARISONS = [{"name": name, "error": error, "tolerance": bound} for name, (error, bound) in worst.items()]
    print(f"12 operators on {torch.cuda.get_device_name()} agree with torch")
else:
    raise AssertionError("the comparison accepts other offsets")
