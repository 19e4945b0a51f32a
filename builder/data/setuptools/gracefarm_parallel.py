"""Compile the objects of setuptools' extension modules in parallel, with at most MAX_JOBS jobs.

setuptools calls `finalize` for each Distribution (entry point setuptools.finalize_distribution_options). It uses processes,
not threads, because torch's BuildExtension changes the compiler's command while it compiles a CUDA source. Extensions that
use ninja or CMake are parallel already and are not changed.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, NoReturn

_OWN = ("setuptools", "distutils", "Cython", "torch", "pybind11", "numpy")
"Packages whose build_extension compiles only with the compiler's `compile`."


class _Jobs:
    """A token for each job that may run, in a pipe that all processes share; and the number of compiled units."""

    def __init__(self, count: int, total: int) -> None:
        self.readable, self.writable = os.pipe()
        os.write(self.writable, b"." * count)
        self.total = total
        self.finished = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 it lives as long as the process

    @contextmanager
    def tell(self, name: str) -> Iterator[None]:
        """Print the compiled unit, as ninja does, and return the token at the end."""
        try:
            yield
            os.write(self.finished.fileno(), b".")
            number = os.fstat(self.finished.fileno()).st_size
            print(f"[{number}/{max(number, self.total)}] {name}", flush=True)
        finally:
            self.give()

    def take(self) -> None:
        """Wait until a job may run."""
        os.read(self.readable, 1)

    def give(self) -> None:
        """Let another job run."""
        os.write(self.writable, b".")


def finalize(distribution: Any) -> None:
    """Replace setuptools' loops over objects and over extensions."""
    count = int(os.environ.get("MAX_JOBS") or "1")
    extensions = distribution.ext_modules
    if count < 2 or not extensions or not hasattr(os, "fork"):
        return
    import distutils.ccompiler
    import distutils.command.build_ext

    compilers: Any = distutils.ccompiler.CCompiler
    build_ext: Any = distutils.command.build_ext.build_ext
    jobs = _Jobs(count, sum(len(extension.sources) for extension in extensions))
    one_by_one = build_ext._build_extensions_serial

    def build_extensions(command: Any) -> None:
        plain = type(command).build_extension.__module__.partition(".")[0] in _OWN
        # A `compile` of the instance is torch's call of ninja.
        if len(command.extensions) < 2 or not plain or "compile" in vars(command.compiler) or _share(command.extensions):
            one_by_one(command)
            return
        _each(command.extensions, lambda extension: _build(command, extension), lambda extension: extension.name)

    def compile_objects(
        compiler: Any,
        sources: Sequence[str],
        output_dir: str | None = None,
        macros: Any = None,
        include_dirs: Any = None,
        debug: bool = False,
        extra_preargs: Any = None,
        extra_postargs: Any = None,
        depends: Any = None,
    ) -> Any:
        _, objects, extra_postargs, pp_opts, build = compiler._setup_compile(
            output_dir, macros, include_dirs, sources, depends, extra_postargs
        )
        cc_args = compiler._get_cc_args(pp_opts, debug, extra_preargs)

        def compile_one(name: str) -> None:
            source, extension = build[name]
            with jobs.tell(source):
                compiler._compile(name, source, extension, cc_args, extra_postargs, pp_opts)

        _each([name for name in objects if name in build], compile_one, str, jobs)
        return objects

    build_ext._build_extensions_serial = build_extensions
    compilers.compile = compile_objects


def _share(extensions: Sequence[Any]) -> bool:
    """Whether two extensions have a common source, which each compiles with its macros to the same object."""
    names = [PurePath(source).with_suffix("") for extension in extensions for source in extension.sources]
    return len(names) != len(set(names))


def _build(command: Any, extension: Any) -> None:
    with command._filter_build_errors(extension):
        command.build_extension(extension)


def _each(items: Sequence[Any], work: Callable[[Any], None], name: Callable[[Any], str], jobs: _Jobs | None = None) -> None:
    """Do the work for each item in a process. With `jobs`, a process starts when a job may run, and the work lets the next one
    run. After a failure no process starts."""
    from distutils.errors import CompileError

    running: dict[int, Any] = {}
    failed: list[str] = []

    def end(options: int) -> None:
        for pid in list(running):
            ended, status = os.waitpid(pid, options)
            if ended:
                item = running.pop(pid)
                failed.extend([name(item)] if status else [])

    for item in items:
        if jobs is not None:
            jobs.take()
        end(os.WNOHANG)
        if failed:
            if jobs is not None:
                jobs.give()
            break
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            _child(work, item)
        running[pid] = item
    end(0)
    if failed:
        raise CompileError("not compiled: " + ", ".join(failed))


def _child(work: Callable[[Any], None], item: Any) -> NoReturn:
    code = 1
    try:
        work(item)
        code = 0
    except BaseException as error:  # noqa: BLE001 the parent reports the failure
        print(f"{type(error).__module__}.{type(error).__qualname__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
