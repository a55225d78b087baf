# shellcheck shell=bash disable=SC2034 # read by image.sh
# CPython with its standard library, pip, numpy and the module ark, over busybox and bash.
description='CPython 3.11 with its standard library, pip and numpy'
mib=700
packages=(busybox-static bash libc-bin python3 python3-pip python3-numpy)
# Package management, Perl and text tools for it (busybox has those that people use), NIS and Kerberos (only the module nis, removed
# below, wanted them), lists that only maintainer scripts read.
without=(
    base-files dpkg tar mawk debianutils debconf gcc-12-base libmd0 libselinux1 libpcre2-8-0 libacl1 libzstd1 openssl
    ca-certificates libnsl2 libtirpc3 libtirpc-common libgssapi-krb5-2 libkrb5-3 libkrb5support0 libk5crypto3 libkeyutils1
    libcom-err2 python3-wheel
)
programs=(ark-ai)

compose() {
    local root=$1 lib=$1/usr/lib/python3.11 dist=$1/usr/lib/python3/dist-packages arch=usr/lib/x86_64-linux-gnu python
    busybox_links "$root"
    # shellcheck disable=SC2154 # lib.sh's
    install -m 755 "$build/bin/ark-ai" "$root/usr/bin/ark-ai"
    # The module that an agent's programs have models say something with.
    install -D -m 644 -t "$dist/ark" "${BASH_SOURCE[0]%/*}"/ark/*.py
    ln -sf python3 "$root/usr/bin/python"
    # What the packages' alternatives would point at.
    ln -sf blas/libblas.so.3 "$root/$arch/libblas.so.3"
    ln -sf lapack/liblapack.so.3 "$root/$arch/liblapack.so.3"
    # What ark-guestd keeps warm for an agent's code.
    install -D -m 644 "${BASH_SOURCE[0]%/*}/evaluator.py" "$root/usr/lib/ark/evaluator.py"
    # An agent's system belongs to the agent: pip may install into it.
    rm -f "$lib/EXTERNALLY-MANAGED"
    # Hooks that run at every start: Debian's crash reporter, and setuptools' own distutils (Python 3.11 still brings one).
    rm -f "$lib/sitecustomize.py" "$root"/etc/python3.11/sitecustomize.py "$dist/distutils-precedence.pth"
    # Tests, sources of extension modules, the C library's character sets and locales beyond C.UTF-8, and programs for administrators.
    rm -rf "$lib"/{test,idlelib,turtledemo,pydoc_data,lib2to3/tests,ensurepip} "$lib"/lib-dynload/{nis,_test*,_ctypes_test,xxlimited*}.*so
    find "$dist/numpy" -depth -type d \( -name tests -o -name include -o -name src \) -exec rm -rf {} +
    rm -rf "${root:?}/$arch/gconv" "$root/$arch"/engines-3 "$root"/usr/share/{gcc,gdb,readline,python3/runtime.d,python-wheels,libc-bin,perl5} "$root"/var/lib/dpkg \
        "$root"/etc/{apt,default,init.d,update-motd.d,skel,bindresvport.blacklist}
    rm -f "$root"/usr/bin/{bashbug,localedef,iconv,iconvconfig,zdump,pldd,catchsegv,tzselect,py3compile,py3clean,py3versions}
    # Start-up: modules compiled ahead, by the very interpreter that will read them. One process and a fixed hash seed, for what it
    # writes depends on what it compiled before.
    python=("$root/lib64/ld-linux-x86-64.so.2" --library-path "$root/$arch" "$root/usr/bin/python3.11" -S -s)
    find "$root" -type f -name '*.py' -exec touch -d "@$SOURCE_DATE_EPOCH" {} +
    PYTHONHOME=$root/usr PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 "${python[@]}" -m compileall -q --invalidation-mode timestamp -s "$root" -p / \
        "$lib" "$dist"
    # The loader's cache spares every program the search through directories.
    PATH=$PATH:/usr/sbin ldconfig -X -r "$root"
    # A second copy of numpy's largest library, in a directory Python never searches.
    rm -rf "$lib/dist-packages" "$root"/var/cache/ldconfig "$root"/usr/lib/valgrind
}
