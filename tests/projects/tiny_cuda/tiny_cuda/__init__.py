import torch  # noqa: F401 loads libcudart into the process, as in the real packages

from tiny_cuda._core import devices as devices
