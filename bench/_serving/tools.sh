#!/bin/sh
# Copies Debian's sshd, ssh-keygen and ip, with their libraries, to FOLDER. `FOLDER/install.sh WORK` installs them on a machine that
# lacks them. Its glibc may be newer than Debian's. usage: tools.sh FOLDER
set -eu
folder=$1 scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$folder/bin" "$folder/lib"
(cd "$scratch" && apt-get download -qq openssh-server openssh-client iproute2 libwrap0 2>/dev/null && for package in *.deb; do dpkg-deb -x "$package" root; done)
cp "$scratch/root/bin/ip" "$scratch/root/usr/bin/ssh-keygen" "$scratch/root/usr/sbin/sshd" "$folder/bin/"
find "$scratch/root/usr/lib" -name 'libwrap.so.0' -exec cp -L {} "$folder/lib/" \;
for program in "$folder"/bin/* "$folder"/lib/*; do # the machine has the libraries of glibc
    ldd "$program" | awk '$3 ~ /^\//{print $3}' | grep -vE '/(libc|libm|libresolv|libpthread|libdl|librt)\.so' |
        while read -r library; do cp -L "$library" "$folder/lib/"; done
done
cat >"$folder/install.sh" <<'END'
#!/bin/sh
# Installs ip and ssh-keygen in a folder that the nodes see, and sshd in the folder of the rehearsal. usage: install.sh WORK
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/home/rehearsal/sshd"
cp "$here"/lib/* "$here/bin/sshd" "$1/home/rehearsal/sshd/"
for name in ip ssh-keygen; do
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$here/lib" "$here/bin/$name" >"/usr/local/bin/$name"
    chmod +x "/usr/local/bin/$name"
done
[ ! -x /usr/local/nvidia/bin/nvidia-smi ] || ln -sf /usr/local/nvidia/bin/nvidia-smi /usr/local/bin/nvidia-smi
END
chmod +x "$folder/install.sh"
