"""A CUDA extension without torch, with the list of architectures hard-coded as packages like to do."""

import os
import subprocess

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

GENCODE = [flag for sm in ("75", "80", "86", "90", "100") for flag in ("-gencode", f"arch=compute_{sm},code=sm_{sm}")]


class BuildCuda(build_ext):
    def build_extension(self, ext):
        self.compiler.src_extensions.append(".cu")
        link, cuda = self.compiler.compile, os.environ["CUDA_HOME"]

        def compile_cuda(sources, output_dir=None, **options):
            objects = []
            for number, source in enumerate(sources, 1):
                target = os.path.join(output_dir, source + ".o")
                os.makedirs(os.path.dirname(target), exist_ok=True)
                includes = [f"-I{folder}" for folder in options.get("include_dirs") or []]
                command = [f"{cuda}/bin/nvcc", "-c", source, "-o", target, "-Xcompiler", "-fPIC", "-O2", *GENCODE, *includes]
                print(f"[{number}/{len(sources)}] {' '.join(command)}", flush=True)
                subprocess.run(command, check=True)
                objects.append(target)
            return objects

        self.compiler.compile = compile_cuda
        ext.include_dirs += self.include_dirs
        super().build_extension(ext)
        self.compiler.compile = link


setup(
    packages=["tiny_cuda"],
    ext_modules=[
        Extension(
            "tiny_cuda._core", ["core.cu"], libraries=["cudart", "stdc++"], library_dirs=[os.environ["CUDA_HOME"] + "/lib64"]
        ),
    ],
    cmdclass={"build_ext": BuildCuda},
)
