import ctypes
import glob
import os

# libcudart into the process, as importing torch would do it, which takes an emulated Python long.
_packages = os.path.dirname(os.path.dirname(__file__))
ctypes.CDLL(glob.glob(_packages + "/nvidia/*/lib/libcudart.so.*")[0], mode=ctypes.RTLD_GLOBAL)
