# shellcheck shell=bash
# Shared by the recipes of the guest kernel, the images and the emulated host: steps that are cached by content, run in a
# directory of their own and leave either all their outputs or nothing.
#
# A recipe sources this file, then calls
#   step NAME "what is built" KEY MIB FUNCTION OUTPUT...
# FUNCTION runs with $work (an empty directory) and must leave each OUTPUT's file name in $work/out. The outputs are moved into
# place, together, only after it succeeded. A second run with the same KEY and all outputs there prints one line and does nothing.

set -euo pipefail
export LC_ALL=C TZ=UTC

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${ARK_BUILD:-$repo/build}
cache=${ARK_CACHE:-$build/.cache}
# Time of every file in an image, and of the kernel: makes the outputs depend on their inputs only. 2026-01-01.
export SOURCE_DATE_EPOCH=1767225600
work=
umask 022

# Says what is wrong in a sentence and ends the recipe.
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Fails naming the Debian package when a tool is missing: need PROGRAM PACKAGE
need() {
    command -v "$1" >/dev/null || PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ||
        die "$1 is missing. Install it with: apt-get install $2"
}

# SHA-256 over the given files and, from standard input, any further text.
key_of() {
    { cat "$@" && cat; } | sha256sum | cut -c1-64
}

cleanup() {
    local code=$?
    if [ -n "$work" ]; then
        # Directories of extracted packages may be read-only.
        chmod -R u+w "$work" 2>/dev/null || true
        rm -rf "$work"
    fi
    exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

free_mib() {
    df -Pk "$1" | awk 'NR == 2 { print int($4 / 1024) }'
}

step() {
    # FUNCTION sees these (bash scopes are dynamic), hence the prefix.
    local s_name=$1 s_title=$2 s_key=$3 s_mib=$4 s_run=$5 s_started s_log s_out s_code
    shift 5
    mkdir -p "$cache" || die "cannot create $cache. Check the permissions of $build."
    # One builder at a time for each step: a second one waits and then finds the result.
    exec 9>"$cache/$s_name.lock"
    flock 9
    if [ "$(cat "$cache/$s_name.key" 2>/dev/null)" = "$s_key" ] && all_exist "$@"; then
        printf '  %-46s unchanged\n' "$s_title"
        exec 9>&-
        return
    fi
    if [ "$(free_mib "$cache")" -lt "$s_mib" ]; then
        die "$s_title needs about $s_mib MiB, but only $(free_mib "$cache") MiB are free in $cache. Free some space and try again."
    fi
    s_started=$(date +%s)
    # What a killed run left: nobody else can be at it, for the lock is ours.
    rm -rf "$cache/$s_name".??????
    work=$(mktemp -d "$cache/$s_name.XXXXXX")
    mkdir "$work/out"
    s_log=$cache/$s_name.log
    if [ -t 1 ]; then printf '  %-46s ...\r' "$s_title"; fi
    # In a subshell without `||` or `if` around it: either would switch off `set -e` inside.
    set +e
    (
        trap - EXIT
        set -e
        cd "$work"
        "$s_run"
    ) >"$s_log" 2>&1 9>&-
    s_code=$?
    set -e
    if [ "$s_code" != 0 ]; then step_failed "$s_title" "$s_log"; fi
    rm -f "$cache/$s_name.key"
    for s_out in "$@"; do
        mkdir -p "$(dirname "$s_out")"
        # Same file system as the target or not: the name appears only with the whole content behind it.
        if ! { cp -f --sparse=auto "$work/out/${s_out##*/}" "$s_out.new" && mv -f "$s_out.new" "$s_out"; } 2>>"$s_log"; then
            rm -f "$s_out.new"
            step_failed "$s_title" "$s_log"
        fi
    done
    chmod -R u+w "$work"
    rm -rf "$work"
    work=
    printf '%s\n' "$s_key" >"$cache/$s_name.key"
    exec 9>&-
    printf '  %-46s %4d s, %s\n' "$s_title" $(($(date +%s) - s_started)) "$(du -chL "$@" | tail -1 | cut -f1)"
}

all_exist() {
    local file
    for file; do [ -s "$file" ] || return 1; done
}

step_failed() {
    if grep -q 'No space left on device' "$2" || [ "$(free_mib "$cache")" -lt 8 ]; then
        die "the disk is full: $1 was not built and nothing of it was kept. Free space in $cache and try again."
    fi
    printf 'error: %s failed. The end of %s:\n' "$1" "$2" >&2
    tail -n 15 "$2" | cut -c1-200 | sed 's/^/    /' >&2
    exit 1
}

# Downloads package files (NAME=VERSION...) into the cache, once each, without root; apt checks them against its signed lists.
fetch_debs() {
    local spec file missing=() debs=$cache/debs
    mkdir -p "$debs/partial"
    for spec; do
        file=$(deb_file "$spec")
        [ -s "$file" ] || missing+=("$spec")
    done
    [ ${#missing[@]} = 0 ] && return
    (
        cd "$debs/partial"
        # The sandbox user of apt cannot write here when this runs as root, which is worth a warning to apt but not to us.
        apt-get -q -o APT::Sandbox::User=root download "${missing[@]}" &&
            mv -f ./*.deb ..
    )
}

# Path of a downloaded package: apt writes a colon in the version as %3a.
deb_file() {
    local name=${1%%=*} version=${1#*=} arch
    for arch in amd64 all; do
        if [ -s "$cache/debs/${name}_${version//:/%3a}_$arch.deb" ]; then break; fi
    done
    printf '%s\n' "$cache/debs/${name}_${version//:/%3a}_$arch.deb"
}

# Prints NAME=VERSION of the packages and everything they depend on, as if nothing were installed: resolve PACKAGE...
# The answer is kept until the package lists change. A subshell, so that its directory goes with it however it ends.
resolve() (
    lists=$(stat -c '%Y' /var/lib/apt/lists /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null || true)
    mkdir -p "$cache"
    kept=$cache/versions-$(printf '%s\n' "$lists" "$@" | sha256sum | cut -c1-16)
    if ! [ -s "$kept" ]; then
        dir=$(mktemp -d "$cache/resolve.XXXXXX")
        trap 'rm -rf "$dir"' EXIT
        : >"$dir/no-status"
        if ! apt-get -s -o Dir::State::status="$dir/no-status" -o APT::Install-Recommends=false -o Debug::NoLocking=true \
            install "$@" >"$dir/plan" 2>"$dir/errors"; then
            sed -n 's/^E: /apt: /p' "$dir/errors" >&2
            die "apt cannot find $*. Run apt-get update (as root) and try again."
        fi
        sed -n 's/^Inst \([^ ]*\) (\([^ ]*\) .*/\1=\2/p' "$dir/plan" | sort >"$dir/versions"
        mv "$dir/versions" "$kept"
    fi
    cat "$kept"
)
