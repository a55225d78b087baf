# shellcheck shell=bash disable=SC2034 # read by image.sh
# ark-inference over the same userland as base. Models are not in it: each reaches the VM as a read-only block device.
description='ark-inference: language models over MCP; busybox'
mib=96
packages=(busybox-static)
# Static programs need no libc.
without=(libc6 libgcc-s1 gcc-12-base libcrypt1)
programs=(ark-inference)

compose() {
    busybox_links "$1"
    # shellcheck disable=SC2154 # lib.sh's
    install -m 755 "$build/bin/ark-inference" "$1/usr/bin/ark-inference"
}
