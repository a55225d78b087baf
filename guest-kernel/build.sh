#!/usr/bin/env bash
# Builds the guest kernel: Debian's linux-source, pinned, with the options of config/*.config and nothing else.
# Output: build/kernel/vmlinux (uncompressed ELF without symbols, starts by our loader or PVH) and build/kernel/config.
#
# To move to another version: set `version`, then `sha256` to what `apt-cache show linux-source-6.12=VERSION` prints as SHA256, and run
# this. An option that went away or changed its dependencies is named by the check below.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../guest-images/lib.sh
. "$here/../guest-images/lib.sh"

package=linux-source-6.12
version=6.12.117-1~deb12u1
sha256=e849faf31ca3555757f3a8877cb01af92122f744f75d1f3102734651c4e14703

need gcc gcc
need make make
need flex flex
need bison bison
need bc bc
need xz xz-utils
need patch patch

fetch_source() {
    local file
    file=$(deb_file "$package=$version")
    if [ ! -s "$file" ]; then
        fetch_debs "$package=$version" ||
            die "Debian's mirror does not offer $package $version (or apt-get update was never run). Newest there:" \
                "$(apt-cache policy $package | sed -n 's/^ *Candidate: //p'). How to move to it: see the head of guest-kernel/build.sh."
    fi
    echo "$sha256  $file" | sha256sum -c --quiet ||
        die "$file is not the $package $version that is pinned (SHA-256 differs). Delete the file and try again."
    # Less what no x86 guest's build reads, most of the tree: code of other architectures, and of drivers and file systems that are off.
    dpkg-deb --fsys-tarfile "$file" | tar -x -O --wildcards '*.tar.xz' |
        XZ_OPT=-T0 tar -x -J --strip-components=1 -C "$1" --exclude='*/arch/[!Kx]*/*.[chS]' --exclude='*/arch/*.dts*' \
            --exclude='*/Documentation/*/*' --exclude='*/tools/'{perf,power,net,testing} --exclude='*/samples/*/*.[ch]' --exclude='*/sound/*.[ch]' \
            --exclude='*/drivers/'{accel,ata,clk,comedi,crypto,dma,gpio,gpu,hid,hwmon,i2c,iio,infiniband,input,leds,md,media}'/*.[ch]' \
            --exclude='*/drivers/'{mfd,mmc,mtd,net/[ew]*,phy,pinctrl,platform,pmdomain,power,regulator}'/*.[ch]' \
            --exclude='*/drivers/'{s390,scsi,soc,spi,staging,target,thermal,usb,video,watchdog}'/*.[ch]' \
            --exclude='*/fs/'{bcachefs,btrfs,ceph,ext4,f2fs,gfs2,nfs,nfsd,nilfs2,ntfs3,ocfs2,smb,ubifs,xfs}'/*.[ch]'
    local patch
    for patch in "$here"/patches/*.patch; do
        patch -d "$1" -p1 --no-backup-if-mismatch <"$patch" || die "$patch does not apply to $package $version."
    done
}

# Every wanted option must have survived, for Kconfig drops one whose dependency is missing without a word.
check_config() {
    local line wrong=()
    while read -r line; do
        case $line in
        CONFIG_*=*) grep -qxF -- "$line" "$1" || wrong+=("$line") ;;
        '# CONFIG_'*' is not set') ! grep -q "^${line:2:-11}=" "$1" || wrong+=("$line") ;;
        esac
    done < <(cat "$here"/config/*.config)
    [ ${#wrong[@]} = 0 ] ||
        die "the kernel's configuration dropped options of guest-kernel/config (a dependency is missing?): ${wrong[*]}"
}

build_kernel() {
    local tree=$work/linux
    mkdir "$tree"
    fetch_source "$tree"
    cat "$here"/config/*.config >"$work/wanted"
    # allnoconfig with our list is what tinyconfig does with its own: everything not asked for is off.
    kmake KCONFIG_ALLCONFIG="$work/wanted" allnoconfig
    check_config "$tree/.config"
    # One job more than processors: some always wait for the disk.
    kmake -j$(($(nproc) + 1)) vmlinux
    strip -s -o "$work/out/vmlinux" "$tree/vmlinux"
    cp "$tree/.config" "$work/out/config"
}

kmake() {
    make -s -C "$work/linux" ARCH=x86_64 KBUILD_BUILD_TIMESTAMP="@$SOURCE_DATE_EPOCH" KBUILD_BUILD_USER=ark KBUILD_BUILD_HOST=ark \
        KBUILD_BUILD_VERSION=1 "$@"
}

key=$(key_of "$here"/build.sh "$here"/config/*.config "$here"/patches/*.patch < <(gcc -dumpfullversion))
step guest-kernel "guest kernel ${version%%-*}" "$key" 2500 build_kernel "$build/kernel/vmlinux" "$build/kernel/config"
