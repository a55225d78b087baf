# shellcheck shell=bash disable=SC2034 # read by image.sh
# The smallest useful userland: one static busybox, and ark-ai.
description='busybox: shell and the usual small tools'
mib=64
packages=(busybox-static)
# A static program needs no libc.
without=(libc6 libgcc-s1 gcc-12-base libcrypt1)

programs=(ark-ai)

compose() {
    busybox_links "$1"
    # shellcheck disable=SC2154 # lib.sh's
    install -m 755 "$build/bin/ark-ai" "$1/usr/bin/ark-ai"
}
