"""fstab as data, FSC from the kernel's table, the lock that needs no flock, and the ports of deploy.toml."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from deploy.nodes.config import Ports
from deploy.remote import mounts
from deploy.remote.sharedlock import SharedLock

FSTAB = (
    "# <file system>\t<mount point>\n"
    "UUID=1 / ext4 discard 0 1\n"
    "\n"
    "10.0.0.1:/vol\t/home/ubuntu/my\\040share  nfs\tvers=3,proto=tcp,nofsc  0 0 # kept\n"
    "share /mnt/v virtiofs rw 0 0\n"
)
VOLUMES = """NV SERVER   PORT DEV          FSID                              FSC
v3 0a000001  801 0:50         c0ffee:0                          yes
v4 0a000002  801 0:51         0:0                               no
"""


def test_fsc_is_added_to_the_nfs_entry_and_every_other_byte_stays() -> None:
    changed = mounts.with_cache(FSTAB, "/home/ubuntu/my share")
    assert changed == FSTAB.replace("proto=tcp,nofsc", "proto=tcp,fsc")
    assert mounts.with_cache(changed, "/home/ubuntu/my share") == changed
    assert mounts.with_cache(FSTAB, "/mnt/v") == FSTAB  # virtiofs has no such option


def test_fsc_is_read_from_the_kernels_table() -> None:
    assert mounts.cached_volumes(VOLUMES) == {"0:50": True, "0:51": False}


def test_the_shared_lock_lets_one_in_at_a_time(tmp_path: Path) -> None:
    inside, worst = 0, 0

    def work() -> None:
        nonlocal inside, worst
        with SharedLock(tmp_path / "lock"):
            inside += 1
            worst = max(worst, inside)
            time.sleep(0.01)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == 1


def test_a_killed_owner_is_followed_at_once_on_its_own_machine(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path; import os
from deploy.remote.sharedlock import SharedLock
with SharedLock(Path({str(tmp_path)!r})): os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False, cwd=Path.cwd())
    with SharedLock(tmp_path, give_up=5) as held:
        assert held.number == 2
        assert held.still_mine()


def test_no_port_is_one_that_the_kernel_gives_to_outgoing_connections() -> None:
    """Seen in a rehearsal: a connection that had ended a minute ago held Ray's metrics port."""
    assert max(Ports().model_dump().values()) < 32768
