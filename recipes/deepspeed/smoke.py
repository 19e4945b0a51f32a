"""Each operator that the recipe compiles is installed, loads, and has its entry points; nothing is compiled at the first
use. The kernels need a GPU (smoke_gpu.py)."""

import os
from importlib import import_module

os.environ["DS_ACCELERATOR"] = "cuda"
from deepspeed.git_version_info_installed import accelerator_name, installed_ops, torch_info

MODULES = {
    "fused_adam": ("deepspeed.ops.adam.fused_adam_op", {"multi_tensor_adam"}),
    "fused_lamb": ("deepspeed.ops.lamb.fused_lamb_op", {"lamb"}),
    "fused_lion": ("deepspeed.ops.lion.fused_lion_op", {"multi_tensor_lion"}),
    "quantizer": ("deepspeed.ops.quantizer.quantizer_op", {"quantize", "dequantize", "swizzle_quant", "quantized_reduction"}),
    "random_ltd": ("deepspeed.ops.random_ltd_op", {"token_sort_", "token_gather", "token_scatter_", "mask_gather_gpt"}),
    "spatial_inference": ("deepspeed.ops.spatial.spatial_inference_op", {"nhwc_bias_add", "nhwc_bias_add_add"}),
    "transformer": ("deepspeed.ops.transformer.transformer_op", {"forward_fp16", "backward_fp16", "forward_fp32"}),
    "stochastic_transformer": ("deepspeed.ops.transformer.stochastic_transformer_op", {"forward_fp16", "backward_fp32"}),
    "transformer_inference": (
        "deepspeed.ops.transformer.inference.transformer_inference_op",
        {"layer_norm", "rms_norm", "softmax_fp16", "softmax_bf16", "qkv_gemm_fp32"},
    ),
    "inference_core_ops": ("deepspeed.inference.v2.kernelsinference_core_ops", {"layer_norm", "rms_norm", "bias_activation"}),
    "utils": ("deepspeed.ops.utils_op", {"cast_to_byte_tensor"}),
}
assert accelerator_name == "cuda", accelerator_name
assert (torch_info["version"], torch_info["cuda_version"]) == ("2.11", "13.0"), torch_info
for operator, (name, entries) in MODULES.items():
    assert installed_ops[operator], f"{operator} is not installed"
    module = import_module(name)
    assert module.__file__.endswith(".so"), module.__file__
    assert entries <= set(dir(module)), entries - set(dir(module))
never = {"fp_quantizer", "async_io", "gds", "evoformer_attn", "cutlass_ops", "ragged_device_ops"}
assert not any(installed_ops[name] for name in never), "an operator that cannot be built is said to be installed"
print(f"{len(MODULES)} operators are installed and load")
