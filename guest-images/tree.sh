# shellcheck shell=bash
# What every image has: the directories ark-guestd mounts on, the two users, names for the loopback.

# base_tree ROOT: merged /usr, mount points, /etc.
base_tree() {
    local root=$1
    mkdir -p "$root"/{usr/bin,usr/lib,usr/lib64,proc,sys,dev,tmp,run,root,home/agent,etc,mnt,opt,srv,var/tmp,var/log,var/lib,var/cache}
    ln -s usr/bin "$root/bin"
    ln -s usr/bin "$root/sbin"
    ln -s bin "$root/usr/sbin"
    ln -s usr/lib "$root/lib"
    ln -s usr/lib64 "$root/lib64"
    ln -s /run "$root/var/run"
    ln -s /proc/self/mounts "$root/etc/mtab"
    printf '%s\n' 'root:x:0:0:root:/root:/bin/sh' 'agent:x:1000:1000:agent:/home/agent:/bin/sh' \
        'nobody:x:65534:65534:nobody:/nonexistent:/bin/false' >"$root/etc/passwd"
    printf '%s\n' 'root:x:0:' 'tty:x:5:' 'agent:x:1000:' 'nogroup:x:65534:' >"$root/etc/group"
    printf '%s\n' 'root:*:20454:0:99999:7:::' 'agent:*:20454:0:99999:7:::' 'nobody:*:20454:0:99999:7:::' >"$root/etc/shadow"
    chmod 600 "$root/etc/shadow"
    echo agent >"$root/etc/hostname"
    printf '%s\n' '127.0.0.1 localhost' '127.0.1.1 agent' >"$root/etc/hosts"
    printf '%s\n' 'passwd: files' 'group: files' 'hosts: files dns' >"$root/etc/nsswitch.conf"
    # No network, so no name server.
    : >"$root/etc/resolv.conf"
    printf '%s\n' 'export PATH=/usr/local/bin:/usr/bin:/bin' "export PS1='\\u@\\h:\\w\\\$ '" >"$root/etc/profile"
    printf '%s\n' /bin/sh /bin/bash >"$root/etc/shells"
    printf '%s\n' 'NAME="NOA ARK"' 'ID=noa-ark' 'ID_LIKE=debian' 'PRETTY_NAME="NOA ARK agent (Debian 12)"' 'VERSION_ID="12"' \
        >"$root/etc/os-release"
}

# unpack DEB ROOT: the package's files, through the merged /usr (links of ROOT are followed), without documentation.
unpack() {
    dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --keep-directory-symlink --no-same-owner \
        --exclude='./usr/share/doc*' --exclude='./usr/share/man' --exclude='./usr/share/locale' --exclude='./usr/share/info' \
        --exclude='./usr/share/lintian' --exclude='./usr/share/bug' --exclude='./usr/share/applications' \
        --exclude='./usr/share/pixmaps' --exclude='./usr/share/debconf' --exclude='./usr/share/menu' \
        --exclude='./usr/share/initramfs-tools' --exclude='./usr/share/binfmts' --exclude='./usr/share/debianutils' \
        --exclude='./usr/include' --exclude='*.a'
}

# busybox_links ROOT: a link per applet, except where a package brings the program.
busybox_links() {
    local applet
    for applet in $("$1/bin/busybox" --list); do
        case $applet in init | linuxrc) continue ;; esac
        [ -e "$1/usr/bin/$applet" ] || ln -s busybox "$1/usr/bin/$applet"
    done
}

# finish_tree ROOT: what must hold in every image, whatever the recipe did.
finish_tree() {
    local dir
    for dir in proc sys dev tmp root run etc home/agent; do
        [ -d "$1/$dir" ] || die "the recipe removed /$dir"
    done
    [ -e "$1/bin/sh" ] || die "the recipe left no /bin/sh"
    find "$1" -type d -empty -path '*/share/*' -delete
    find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
}
