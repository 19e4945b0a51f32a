"""Runs in the clean environment: facts about the GPU that torch finds. Prints one JSON line that starts with GRACEFARM."""

import ctypes
import json


def driver() -> str:
    """The version of NVIDIA's driver, as 580.82.07; empty if its library does not tell."""
    version = ctypes.create_string_buffer(96)
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        failed = library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(version, len(version))
    except (OSError, AttributeError):
        return ""
    return "" if failed else version.value.decode()


try:
    import torch
except ImportError:
    found = {"reason": "the environment has no torch"}
else:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found = {"device": torch.cuda.get_device_name(), "sm": f"{major}{minor}", "driver": driver()}
    else:
        found = {"reason": "no GPU"}
print("GRACEFARM" + json.dumps(found))
