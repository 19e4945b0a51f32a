"""The rehearsal's locks, with the one wheel of each package that a node installs. tools/rehearsal_lock.py writes them."""

from __future__ import annotations

from importlib import resources

from gracefarm import pins

PYTHON = (3, 11)
MACHINES = ("x86_64", "aarch64")


def environment(machine: str) -> dict[str, str]:
    """The environment for markers on a node with Linux and Python 3.11."""
    version = ".".join(map(str, PYTHON))
    return {
        "platform_machine": machine,
        "python_version": version,
        "python_full_version": f"{version}.0",
        "implementation_name": "cpython",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
    }


def on(text: str, machine: str) -> str:
    """The pins of a lock for one architecture."""
    applying = [pin for pin in pins.parse(text, "the rehearsal's lock") if pin.applies(environment(machine))]
    return "".join(pins.render(pin.name, pin.version, pin.sha256) for pin in applying)


def merged(*texts: str) -> str:
    """Merge locks into one without duplicates."""
    every = [pin for text in texts for pin in pins.parse(text, "the rehearsal's lock")]
    return "".join(sorted({pins.render(pin.name, pin.version, pin.sha256) for pin in every}))


def committed(name: str) -> str:
    """A lock in deploy/data: rehearsal or rehearsal-download."""
    return (resources.files("deploy") / "data" / f"{name}.lock").read_text()
