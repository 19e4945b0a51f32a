"""Writes and unpacks the archives of bench/away.sh. They take the inputs of a compile to another machine and the results back.

A folder of archives has PART.tar.zst.000, PART.tar.zst.001 and so on (PART.tar.000 without compression), and the file `pieces`
with their sha256. A part can be unpacked when all its pieces have arrived. On the other machine, `take` runs with the
standard library only.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

SEPARATE = ("roots", "toolchains")
"Folders of GRACEFARM_HOME. Their entries are large, and the name of an entry is a digest. So each entry is one part."
ENVIRONMENTS = "environments"
"The environments share most of their files through hard links. So all environments are one part, which has each file once."
LEFT_OUT = ("*/triton/*.so", "*/triton/*.a", "*/triton/*/bin/*", "*/nvidia/*/bin/*", "*/nvidia/*/nvvm/*", "*_static.a")
"Files of an environment that no compile reads: programs that compile for the GPU, which the toolchain has for this machine, "
"and libraries that no program links."
NEEDED = ("*/libcudart_static.a",)
"Exceptions from LEFT_OUT. nvcc and CMake link them."
DEVICE_CODE = (".nv_fatbin", "__nv_relfatbin", ".cask_resource", ".debug_")
"Prefixes of the names of the sections that no linker reads."
PROGRAMS = ("bwrap", "zstd", "git")
"Programs that the builder runs, and that the other machine may lack."
UNCOMPRESSED = "programs"
"The part with PROGRAMS. It is unpacked first, since it contains zstd."
UNFINISHED = 75


def main() -> None:
    """See bench/away.sh, which is the only caller."""
    verb, *arguments = sys.argv[1:]
    verbs: dict[str, Callable[..., int]] = {"prepare": prepare, "take": take, "results": results, "continue": carry_on}
    sys.exit(verbs[verb](*map(Path, arguments)))


def prepare(carried: Path, reads: Path, site: Path, request: Path) -> int:
    """On the first machine: pack the files that the compiles read (the builder lists them), the project, and programs."""
    from builder.planning.settings import PARTS, load

    settings = load()
    paths = sorted({Path(line) for line in reads.read_text().splitlines()})
    environments = [path for path in paths if path.parent.name == ENVIRONMENTS]
    large: dict[str, dict[str, Path]] = {}
    rest: dict[str, Path] = {}
    for path in paths:
        place = path.relative_to(settings.home)
        whole = rest
        if path in environments:
            whole = large.setdefault(_part_of(environments), {})
        elif place.parts[0] in SEPARATE:
            whole = large.setdefault(_part_of([path]), {})
        whole[f"home/{place}"] = path
    rest |= {f"project/{name}": settings.project / name for name in PARTS if (settings.project / name).is_dir()}
    here = [digests for part, digests in _parts(carried).items() if part in large]
    known = {
        piece: digest
        for digests in here
        for piece, digest in digests.items()
        if all((carried / name).is_file() for name in digests)
    }
    for piece in carried.glob("*.tar*"):
        if piece.name not in known:
            piece.unlink()
    with _programs(carried) as programs:
        known |= pack(carried, UNCOMPRESSED, {UNCOMPRESSED: programs}, compressed=False)
    known |= pack(carried, "site", {"site": site})
    for part, wanted in large.items():
        if not any(_part(piece) == part for piece in known):
            print(f"packing {part}", flush=True)
            known |= pack(carried, part, wanted, lean if part.startswith(ENVIRONMENTS) else _whole)
            _list(carried, known)
    known |= pack(carried, "sources", rest | {"request": request})
    _list(carried, known)
    size = sum((carried / piece).stat().st_size for piece in known)
    print(f"{len(known)} pieces, {size / 1e6:.0f} MB, and the file `pieces` in {carried}")
    return 0


def take(carried: Path, work: Path) -> int:
    """On the other machine: unpack each part whose pieces have all arrived. The exit code is 75 while pieces are missing."""
    parts = _parts(carried)
    missing = [] if parts else ["pieces"]
    for part in sorted(parts, key=lambda name: (name != UNCOMPRESSED, name)):
        taken = work / "taken" / part
        digests = "\n".join(parts[part].values())
        if taken.is_file() and taken.read_text() == digests:
            continue
        absent = [piece for piece, digest in parts[part].items() if not _arrived(carried / piece, digest)]
        if absent:
            missing += absent
            continue
        unpack([carried / piece for piece in parts[part]], work)
        taken.parent.mkdir(exist_ok=True)
        taken.write_text(digests)
        print(f"unpacked {part}")
        for piece in parts[part]:
            (carried / piece).unlink()
    print(f"missing: {' '.join(missing)}" if missing else "all parts are unpacked")
    return UNFINISHED if missing else 0


def results(folder: Path, work: Path) -> int:
    """On the other machine: pack the compiled builds. Of other builds, pack the new cache files since the last call."""
    known = _pieces(folder)
    shutil.copy(work / "request", folder / "request")
    _list(folder, known)
    for name, build_id in _request(work / "request").items():
        build, ended = work / "home" / "builds" / build_id, work / f"{name}.rc"
        part = f"built-{name}-{build_id}"
        if (build / "compiled.json").is_file() or (ended.is_file() and ended.read_text().strip() == "0"):
            if not any(_part(piece) == part for piece in known):
                wanted = {f"home/builds/{build_id}/{path.name}": path for path in build.iterdir() if path.name != "work"}
                tree = work / "home" / "trees" / build_id
                wanted |= {f"home/trees/{build_id}": tree} if tree.is_dir() else {}
                known |= pack(folder, part, wanted)
                _list(folder, known)
            print(f"{name}: compiled")
        else:
            known |= _pack_caches(folder, work, name, known)
    return 0


def carry_on(folder: Path) -> int:
    """On the first machine: unpack the results. Print the names of the compiled recipes."""
    from builder.planning.settings import load
    from builder.proof import record
    from gracefarm.files import lock

    settings = load()
    home = settings.home
    home.mkdir(parents=True, exist_ok=True)
    missing: list[str] = []
    for part, digests in _parts(folder).items():
        absent = [piece for piece, digest in digests.items() if not _arrived(folder / piece, digest)]
        kind, _, name = part.partition("-")
        name, _, build_id = name.rpartition("-")
        if absent:
            missing += absent
            continue
        built = kind == "built"
        with lock(record.lock_path(settings, build_id)) if built else nullcontext():
            if not built or not (home / "builds" / build_id / "dist").is_dir():
                unpack([folder / piece for piece in digests], home, "--strip-components=1")
        print(name if built else f"{name}: unpacked a part of its caches", file=sys.stdout if built else sys.stderr)
    if missing:
        print(f"missing: {' '.join(missing)}", file=sys.stderr)
    return 0


def _pack_caches(folder: Path, work: Path, name: str, known: Mapping[str, str]) -> dict[str, str]:
    """Pack the files of a recipe's caches that no earlier call has packed."""
    listed = folder / f"packed-{name}"
    packed = set(listed.read_text().splitlines()) if listed.is_file() else set()
    home = work / "home"
    files = [path for kind in ("ccache", "device") for path in sorted((home / kind / name).rglob("*")) if path.is_file()]
    # The names of incomplete files begin with a dot or contain `.tmp.`. ccache changes its file `stats` all the time.
    complete = [path for path in files if not path.name.startswith(".") and ".tmp." not in path.name and path.name != "stats"]
    fresh = {f"home/{path.relative_to(home)}": path for path in complete}
    fresh = {place: path for place, path in fresh.items() if place not in packed}
    print(f"{name}: not compiled yet; {len(fresh)} new files of its caches")
    if not fresh:
        return {}
    number = len({_part(piece) for piece in known if _part(piece).startswith(f"partial-{name}-")})
    pieces = pack(folder, f"partial-{name}-{number:03}", fresh)
    _list(folder, {**known, **pieces})
    listed.write_text("\n".join(sorted(packed | set(fresh))))
    return pieces


def _request(place: Path) -> dict[str, str]:
    """The build id of each recipe that was prepared."""
    return dict(line.split() for line in place.read_text().splitlines()[1:])


Change = Callable[[str, bytes], bytes | bytearray | None]
"From the name and content of a file to its content in the archive. None: the file is omitted."


def _whole(_name: str, content: bytes) -> bytes:
    return content


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def lean(name: str, content: bytes) -> bytes | bytearray | None:
    """An environment's file as a compile requires it: the size is equal, but device code and debug data are zeros."""
    if _fits(name, LEFT_OUT) and not _fits(name, NEEDED):
        return None
    if not content.startswith(b"\x7fELF"):
        return content
    from elftools.elf.elffile import ELFFile

    changed = bytearray(content)
    for section in ELFFile(io.BytesIO(content)).iter_sections():
        if section.name.startswith(DEVICE_CODE) and section["sh_type"] != "SHT_NOBITS":
            start, size = section["sh_offset"], section["sh_size"]
            changed[start : start + size] = bytes(size)
    return changed


def pack(
    folder: Path, part: str, wanted: Mapping[str, Path], change: Change = _whole, *, compressed: bool = True
) -> dict[str, str]:
    """Write one part. Return its pieces with their sha256."""
    size = int(subprocess.check_output(["numfmt", "--from=iec", os.environ["PIECE"]]))
    for old in folder.glob(f"{part}.tar*"):
        old.unlink()
    prefix = folder / f"{part}.tar{'.zst' if compressed else ''}."
    split = ["split", f"--bytes={size}", "--numeric-suffixes", "--suffix-length=3", "-", str(prefix)]
    with subprocess.Popen(split, stdin=subprocess.PIPE) as splitter:
        assert splitter.stdin is not None
        if compressed:
            level = f"-{os.environ.get('LEVEL', '9')}"
            with subprocess.Popen(["zstd", "-q", "-T0", level], stdin=subprocess.PIPE, stdout=splitter.stdin) as packer:
                assert packer.stdin is not None
                _write(packer.stdin, wanted, change)
                packer.stdin.close()
            _succeeded(packer)
        else:
            _write(splitter.stdin, wanted, change)
        splitter.stdin.close()
    _succeeded(splitter)
    return {piece.name: _sha256(piece) for piece in sorted(folder.glob(f"{prefix.name}*"))}


def _write(stream: IO[bytes], wanted: Mapping[str, Path], change: Change) -> None:
    """Write an archive. In environments, a hard link to an earlier file remains a hard link."""
    written: set[str] = set()
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        for name, path in wanted.items():
            for place in _below(path):
                inside = name if place == path else f"{name}/{place.relative_to(path)}"
                with suppress(FileNotFoundError):  # a running build has removed the file from its cache
                    _add(archive, place, inside, change, written)


def _add(archive: tarfile.TarFile, place: Path, inside: str, change: Change, written: set[str]) -> None:
    """Add one file. `written` has the names of the added files of environments, to which hard links are possible."""
    entry = archive.gettarinfo(place, inside)
    if entry is None:  # a socket
        return
    if not stat.S_ISREG(place.lstat().st_mode) or (entry.islnk() and entry.linkname in written):
        archive.addfile(entry)
    elif (content := change(inside, place.read_bytes())) is not None:
        entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", len(content)
        archive.addfile(entry, io.BytesIO(content))
        if change is lean:
            written.add(inside)


def _below(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            yield from _below(entry)


def unpack(pieces: Iterable[Path], into: Path, *options: str) -> None:
    """Unpack the pieces of one part. If an earlier call was interrupted, all files are unpacked again."""
    pieces = list(pieces)
    command = ["tar", "--extract", "--no-same-owner", "--preserve-permissions", f"--directory={into}", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as unpacker:
        assert unpacker.stdin is not None
        compressed = ".zst." in pieces[0].name
        packer = subprocess.Popen(["zstd", "-dcq"], stdin=subprocess.PIPE, stdout=unpacker.stdin) if compressed else None
        stream = unpacker.stdin if packer is None else packer.stdin
        assert stream is not None
        for piece in pieces:
            with piece.open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 20)
        stream.close()
        if packer is not None:
            packer.wait()
            unpacker.stdin.close()
            _succeeded(packer)
    _succeeded(unpacker)


@contextmanager
def _programs(folder: Path) -> Iterator[Path]:
    """A folder with PROGRAMS, their libraries and the loader. So these programs run on a machine with any C library."""
    into = folder / "programs"
    shutil.rmtree(into, ignore_errors=True)
    (into / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        program = shutil.which(name)
        if program is None:
            sys.exit(f"the program {name} is missing: install it, then repeat the command")
        shutil.copy(program, into / f"{name}.program")
        for line in subprocess.check_output(["ldd", program], text=True).splitlines():
            library = next((word for word in line.split() if word.startswith("/")), None)
            if library is not None:
                shutil.copy(library, into / Path(library).name)
        script = into / "bin" / name
        script.write_text(
            '#!/bin/sh\nhere=$(dirname "$(dirname "$(readlink -f "$0")")")\n'
            f'exec "$here"/ld-linux-*.so.* --library-path "$here" "$here/{name}.program" "$@"\n'
        )
        script.chmod(0o755)
    yield into
    shutil.rmtree(into)


def _part_of(paths: Sequence[Path]) -> str:
    """The name of the part with these folders. It contains the name of the folder, or a digest of all names."""
    digests = "".join(path.name for path in paths)
    name = digests if len(paths) == 1 else hashlib.sha256(digests.encode()).hexdigest()
    return f"{paths[0].parent.name}-{name}"


def _part(piece: str) -> str:
    return piece.partition(".tar")[0]


def _pieces(folder: Path) -> dict[str, str]:
    """The sha256 of each piece."""
    place = folder / "pieces"
    lines = place.read_text().splitlines() if place.is_file() else []
    return {piece: digest for digest, piece in (line.split() for line in lines)}


def _parts(folder: Path) -> dict[str, dict[str, str]]:
    parts: dict[str, dict[str, str]] = {}
    for piece, digest in _pieces(folder).items():
        parts.setdefault(_part(piece), {})[piece] = digest
    return parts


def _list(folder: Path, pieces: Mapping[str, str]) -> None:
    """Write the file `pieces` in the format of sha256sum."""
    draft = folder / "pieces.new"
    draft.write_text("".join(f"{pieces[piece]}  {piece}\n" for piece in sorted(pieces)))
    draft.replace(folder / "pieces")


def _arrived(piece: Path, digest: str) -> bool:
    return piece.is_file() and _sha256(piece) == digest


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _succeeded(process: subprocess.Popen[bytes]) -> None:
    if process.returncode:
        sys.exit(f"{process.args!r} failed with exit code {process.returncode}")


if __name__ == "__main__":
    main()
