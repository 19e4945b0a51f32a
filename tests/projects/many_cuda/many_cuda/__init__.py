import ctypes
import glob
import os

# Load libcudart into the process, as an import of torch does. An import of torch takes long in an emulated Python.
_packages = os.path.dirname(os.path.dirname(__file__))
ctypes.CDLL(glob.glob(_packages + "/nvidia/*/lib/libcudart.so.*")[0], mode=ctypes.RTLD_GLOBAL)
