# shellcheck shell=bash disable=SC2034 # read by image.sh
# The smallest useful userland: one static busybox.
description='busybox: shell and the usual small tools'
mib=64
packages=(busybox-static)
# A static program needs no libc.
without=(libc6 libgcc-s1 gcc-12-base libcrypt1)

compose() {
    busybox_links "$1"
}
