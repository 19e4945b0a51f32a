"""Several CUDA translation units, compiled as torch's BuildExtension does it: its build.ninja, with its dependency flags."""

import glob
import os
import subprocess
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

RULES = """\
ninja_required_version = 1.3
nvcc = {cuda}/bin/nvcc

rule cuda_compile
  depfile = $out.d
  deps = gcc
  command = $nvcc --generate-dependencies-with-compile --dependency-output $out.d {flags} -c $in -o $out

rule compile
  command = {cxx} -MMD -MF $out.d {cxxflags} -c $in -o $out
  depfile = $out.d
  deps = gcc

"""


class BuildNinja(build_ext):
    def build_extension(self, ext):
        cuda, cxx = os.environ["CUDA_HOME"], os.environ["CXX"]
        folder = os.path.abspath(self.build_temp)
        os.makedirs(folder, exist_ok=True)
        includes = f"-I{sysconfig.get_path('include')} -I{cuda}/include -I{os.path.abspath('include')}"
        flags = f"-O2 -Xcompiler -fPIC -gencode arch=compute_90,code=sm_90 {includes}"
        text = RULES.format(cuda=cuda, cxx=cxx, flags=flags, cxxflags=f"-O2 -fPIC {includes}")
        objects = []
        for source in ext.sources:
            target = os.path.join(folder, os.path.splitext(os.path.basename(source))[0] + ".o")
            rule = "cuda_compile" if source.endswith(".cu") else "compile"
            text += f"build {target}: {rule} {os.path.abspath(source)}\n"
            objects.append(target)
        text += f"\ndefault {' '.join(objects)}\n"
        with open(os.path.join(folder, "build.ninja"), "w") as stream:
            stream.write(text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run(["ninja", "-v", *jobs], cwd=folder, check=True)
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        subprocess.run([cxx, "-shared", "-o", target, *objects, f"-L{cuda}/lib64", "-lcudart"], check=True)


setup(
    packages=["many_cuda"],
    ext_modules=[Extension("many_cuda._core", sorted([*glob.glob("src/*.cu"), *glob.glob("src/*.cpp")]))],
    cmdclass={"build_ext": BuildNinja},
)
