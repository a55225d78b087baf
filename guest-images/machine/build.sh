#!/usr/bin/env bash
# Builds what `ark machine` starts: build/machine/vmlinuz (Debian's cloud kernel), initramfs.cpio (busybox, modules, init) and
# assets.erofs (bin/, kernel/, images/ and models/ of the build). No root needed: packages are unpacked, devices are made under fakeroot.
# shellcheck source=../lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

here=$repo/guest-images/machine
need mkfs.erofs erofs-utils
need fakeroot fakeroot
need cpio cpio
need depmod kmod
need strip binutils

# With all that each of them depends on; ext4 is built in. vhost_vsock is for the benchmarks' peer (QEMU); nothing loads it by itself.
modules=(kvm-amd virtio_pci virtio_blk virtio_net erofs vhost_vsock)

build_boot() {
    local root=$work/root
    fetch_debs "$kernel" "$busybox"
    mkdir "$work/kernel" "$root"
    dpkg-deb -x "$(deb_file "$kernel")" "$work/kernel"
    cp "$work"/kernel/boot/vmlinuz-* "$work/out/vmlinuz"

    mkdir -p "$root"/{bin,sbin,dev,proc,sys,tmp,run,root,etc,opt/ark,var/lib/ark,mnt/test,sys/fs/cgroup}
    dpkg-deb --fsys-tarfile "$(deb_file "$busybox")" | tar -x -O ./bin/busybox >"$root/bin/busybox"
    chmod 755 "$root/bin/busybox"
    local applet
    for applet in $("$root/bin/busybox" --list); do [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"; done
    cp "$here/init" "$root/init"
    cp "$here/ark-services" "$here/ark-poweroff" "$root/sbin/"
    # The kernel asks for modules by this path.
    ln -s ../bin/busybox "$root/sbin/modprobe"
    printf '%s\n' 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
    printf '%s\n' 'root:x:0:' 'tty:x:5:' >"$root/etc/group"
    printf '%s\n' '127.0.0.1 localhost' >"$root/etc/hosts"
    pick_modules "$work"/kernel/lib/modules/* "$root"
    pack "$root" "$work/out/initramfs.cpio"
}

# pick_modules FROM ROOT: the wanted modules, what they depend on, and the list by which modprobe finds that.
pick_modules() {
    local from=$1 to=$2/lib/modules/${1##*/} module line file
    mkdir -p "$to"
    cp "$from"/modules.{order,builtin,builtin.modinfo} "$to/"
    depmod -b "${from%/lib/modules/*}" "${from##*/}"
    for module in "${modules[@]}"; do
        line=$(grep "/$module\.ko:" "$from/modules.dep") || die "the kernel package has no module $module."
        for file in ${line/:/ }; do
            mkdir -p "$to/$(dirname "$file")"
            # Without signature and type information, which nobody checks here: less to load.
            [ -e "$to/$file" ] || strip --strip-unneeded -R .BTF -R .comment -o "$to/$file" "$from/$file"
        done
    done
    depmod -b "$2" "${from##*/}"
    rm -f "$to"/modules.{order,builtin,builtin.modinfo,builtin.bin,builtin.alias.bin,devname,softdep,symbols,symbols.bin,dep.bin,alias.bin}
    # Only for the kernel's own requests, all of which /init has already answered.
    : >"$to/modules.alias"
}

# pack ROOT FILE: an uncompressed cpio archive, owned by root, with the one device that must be there before /dev is mounted.
pack() {
    find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    # shellcheck disable=SC2016 # the inner shell expands it
    fakeroot -- sh -c 'mknod -m 600 "$1/dev/console" c 5 1 && touch -d "@$SOURCE_DATE_EPOCH" "$1/dev/console" "$1/dev" && cd "$1" &&
        find . -mindepth 1 | sort | cpio --quiet -o -H newc --reproducible -R 0:0' - "$1" >"$2"
}

build_assets() {
    local root=$work/root part
    mkdir "$root"
    # Links to the same files where possible: the images are large.
    for part in bin kernel images models; do
        [ ! -d "$build/$part" ] || cp -al "$build/$part" "$root/$part" 2>/dev/null || cp -a "$build/$part" "$root/"
    done
    rm -f "$root/kernel/config"
    PATH=$PATH:/usr/sbin mkfs.erofs -d0 -x-1 --all-root -Eforce-inode-compact -T"$SOURCE_DATE_EPOCH" \
        -U00000000-0000-8000-8000-000000000000 "$work/out/assets.erofs" "$root" >/dev/null
}

out=$build/machine
kernel=$(resolve linux-image-cloud-amd64 | grep '^linux-image-[0-9].*-cloud-amd64=') ||
    die "Debian's linux-image-cloud-amd64 no longer names its kernel package. Run apt-get update (as root) and try again."
busybox=$(resolve busybox-static | grep '^busybox-static=')
key=$(key_of "$here"/{init,ark-services,ark-poweroff,build.sh} "$repo/guest-images/lib.sh" <<<"$kernel $busybox")
step machine "emulated host: kernel and initramfs" "$key" 250 build_boot "$out/vmlinuz" "$out/initramfs.cpio"

# Name, size and time stand for the content here: reading it all again at every `make` would cost seconds.
for part in bin/ark-vmm bin/arkd bin/ark-guestd kernel/vmlinux kernel/guestd.cpio; do
    [ -s "$build/$part" ] || printf '  note: %s is not built yet, so the emulated host will lack it\n' "$part"
done
key=$(key_of "$here/build.sh" < <(cd "$build" && find bin kernel images models -type f -printf '%P %s %T@ %m\n' 2>/dev/null | sort))
step machine-assets "emulated host: programs and images" "$key" 400 build_assets "$out/assets.erofs"
