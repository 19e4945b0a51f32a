import torch  # noqa: F401 brings libcudart into the process, as the real packages do it

from tiny_cuda._core import devices as devices
