"""Queries NVIDIA's driver on a node, in a separate process."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

from deploy.remote.wire import Json
from gracefarm.process import last_line

MODULE = Path("/proc/driver/nvidia/version")

_DRIVER = """
import ctypes, json
cuda = ctypes.CDLL("libcuda.so.1")
def text(code):
    name = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(name))
    return (name.value or b"unknown error").decode()
def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    if code:
        print(json.dumps({"error": f"{name}: {text(code)} ({code})"}))
        raise SystemExit
call("cuInit", 0)
version, count = ctypes.c_int(), ctypes.c_int()
call("cuDriverGetVersion", ctypes.byref(version))
call("cuDeviceGetCount", ctypes.byref(count))
gpus = []
for index in range(count.value):
    device, context, name = ctypes.c_int(), ctypes.c_void_p(), ctypes.create_string_buffer(100)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cuDeviceGet", ctypes.byref(device), index)
    call("cuDeviceGetName", name, 100, device)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    call("cuDevicePrimaryCtxRelease_v2", device)
    gpus.append({"name": name.value.decode(), "free": free.value, "total": total.value})
print(json.dumps({"version": version.value, "gpus": gpus}))
"""
"Runs in a separate process, since cuInit hangs with a broken driver. Creating a context tests more than nvidia-smi."


def cuda() -> Json:
    """CUDA version and memory of each GPU in bytes, or the driver's error; `absent` if there is no driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"absent": True, "device": Path("/dev/nvidiactl").exists()}
    try:
        process = subprocess.run([sys.executable, "-c", _DRIVER], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return {"error": "cuInit did not return within 60 s"}
    try:
        answer: Json = json.loads(process.stdout)
    except ValueError:
        return {"error": last_line(process.stderr, "the driver ended the process")}
    return answer


def memory(_request: Json) -> Json:
    """Free and total memory of each GPU, as `cuda()` returns them."""
    return cuda()


def version(module: Path = MODULE) -> str | None:
    """The version of NVIDIA's kernel module."""
    try:
        text = module.read_text()
    except OSError:
        return None
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)*)\b", text)
    return match.group(1) if match else None
