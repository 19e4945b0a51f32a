#!/bin/sh
# A node. This script is the first process in new namespaces (network, mounts, processes, names, shared memory). It prepares the
# machine for `deploy`, and becomes its sshd. On the surrounding machine, only the share can be written.
# With RIG_ROOT, sessions have another userland, which qemu runs (RIG_QEMU and RIG_BINFMT, only for this node).
# Environment: RIG_NAME RIG_FOLDER RIG_SHARE (empty: none) RIG_MOUNT RIG_USER RIG_UID RIG_ADDRESS RIG_GATEWAY RIG_SSHD RIG_LIBRARIES RIG_PYTHON
# RIG_GPUS: numbers of the node's GPUs, such as `0 1`; empty: all GPUs of the machine.
set -eu
echo unshared # the room adds the network interface when it reads this
read -r _go

hostname "$RIG_NAME"
ip link set lo up
ip link set eth0 up
ip addr add "$RIG_ADDRESS/24" dev eth0
ip route add default via "$RIG_GATEWAY" # nothing is forwarded, but the engine looks up the route to 8.8.8.8

# Files in the homes or in /tmp of this machine are bound before these folders are hidden.
mount -t tmpfs -o mode=755,size=64m rig /run
mkdir /run/rig /run/rig-sshd /run/rig-python /run/sshd
mount --bind "$RIG_FOLDER" /run/rig
exec 2>/run/rig/boot.log
[ -z "$RIG_LIBRARIES" ] || mount --bind "$RIG_LIBRARIES" /run/rig-sshd
[ -z "$RIG_PYTHON" ] || mount --bind "$RIG_PYTHON" /run/rig-python
if [ -n "$RIG_ROOT" ]; then
    mkdir /run/rig-lower
    mount --bind "$RIG_ROOT" /run/rig-lower
    : >/run/rig-qemu
    mount --bind "$RIG_QEMU" /run/rig-qemu
fi
mount -t tmpfs -o mode=755,size=1m rig /mnt
if [ -n "$RIG_SHARE" ]; then
    mkdir "$RIG_MOUNT"
    mount --bind "$RIG_SHARE" "$RIG_MOUNT"
fi
for file in passwd group shadow hosts hostname nsswitch.conf; do
    [ ! -e "/etc/$file" ] || mount --bind "/run/rig/etc/$file" "/etc/$file"
done
mount -t tmpfs -o mode=755,size=1m rig /home
mount -t tmpfs -o mode=700,size=1m rig /root
mkdir "/home/$RIG_USER"
mount --bind /run/rig/home "/home/$RIG_USER"
mount --bind /run/rig/tmp /tmp
mount --bind /run/rig/tmp /var/tmp
if [ -n "$RIG_GPUS" ]; then # a GPU without device file does not exist, and no device file can be created on a read-only file system
    mkdir /run/rig-dev /run/rig-dev/pts /run/rig-dev/shm
    devices="null zero full random urandom tty nvidiactl nvidia-uvm nvidia-uvm-tools"
    for gpu in $RIG_GPUS; do devices="$devices nvidia$gpu"; done
    for device in $devices; do
        [ -e "/dev/$device" ] || continue
        : >"/run/rig-dev/$device"
        mount --bind "/dev/$device" "/run/rig-dev/$device"
    done
    ln -s pts/ptmx /run/rig-dev/ptmx
    for name in fd:fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do ln -s "/proc/self/${name#*:}" "/run/rig-dev/${name%:*}"; done
    mount --rbind /run/rig-dev /dev
    mount -o remount,bind,ro /dev
fi
mount -t tmpfs -o mode=1777,size=8g rig /dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 rig /dev/pts
mount -o remount,bind,ro /

if [ -n "$RIG_ROOT" ]; then
    mount -t binfmt_misc rig /proc/sys/fs/binfmt_misc
    printf '%s' "$RIG_BINFMT" >/proc/sys/fs/binfmt_misc/register
    mkdir /run/rig-root /run/rig-over
    mount -t tmpfs -o mode=755 rig /run/rig-over
    mkdir /run/rig-over/upper /run/rig-over/work
    mount -t overlay -o "lowerdir=/run/rig-lower,upperdir=/run/rig-over/upper,workdir=/run/rig-over/work" rig /run/rig-root
    for folder in proc dev tmp mnt home; do mount --rbind "/$folder" "/run/rig-root/$folder"; done
    for file in passwd group shadow hosts hostname nsswitch.conf; do
        mount --bind "/run/rig/etc/$file" "/run/rig-root/etc/$file"
    done
fi
ulimit -n 65536 2>/dev/null || true # as on machines for this work
case $RIG_SSHD in /run/rig-sshd/*) export LD_LIBRARY_PATH=/run/rig-sshd ;; esac
cd /
exec "$RIG_SSHD" -D -e -f /run/rig/etc/sshd_config >>/run/rig/sshd.log 2>&1 </dev/null
