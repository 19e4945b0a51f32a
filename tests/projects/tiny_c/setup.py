from setuptools import Extension, setup

setup(packages=["tiny_c"], ext_modules=[Extension("tiny_c._core", ["core.c"])])
