"""Whether the kernel starts programs of another architecture (binfmt_misc)."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path("/proc/sys/fs/binfmt_misc")


def registration(target: str) -> str | None:
    """Why the kernel cannot start the target's programs inside a sandbox; None if it can.

    Without flag F the kernel would search qemu inside the sandbox's root, at the path of another machine.
    """
    if not (FOLDER / "register").exists():
        return "binfmt_misc is not mounted"
    place = FOLDER / f"qemu-{target}"
    if not place.exists():
        return "not registered"
    lines = place.read_text().splitlines()
    if "enabled" not in lines:
        return "registered, but disabled"
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return None if "F" in flags else "registered without flag F, which a sandbox requires"
