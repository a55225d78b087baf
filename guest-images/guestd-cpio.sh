#!/usr/bin/env bash
# Makes build/kernel/guestd.cpio: the guest's first root, whose /init is build/bin/ark-guestd. Uncompressed, for the kernel would
# spend longer unpacking than the VMM reading.
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

need cpio cpio
need fakeroot fakeroot
guestd=$build/bin/ark-guestd
[ -s "$guestd" ] || die "$guestd is missing. Build it first: cargo build --release -p ark-guestd, or make"

pack_guestd() {
    mkdir -p root/dev
    install -m 755 "$guestd" root/init
    # The symbol table is a third of the file, and every boot copies it.
    strip -s root/init
    find root -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    # The kernel opens /dev/console for PID 1 before anything is mounted; fakeroot makes the node without being root.
    # shellcheck disable=SC2016 # the inner shell expands it
    fakeroot -- sh -c 'mknod -m 600 root/dev/console c 5 1 && touch -d "@$SOURCE_DATE_EPOCH" root/dev root/dev/console && cd root &&
        printf "%s\n" dev dev/console init | cpio --quiet -o -H newc --reproducible -R 0:0' >out/guestd.cpio
}

key=$(key_of "$guestd" "${BASH_SOURCE[0]}" </dev/null)
step guestd-cpio "guest initrd" "$key" 32 pack_guestd "$build/kernel/guestd.cpio"
