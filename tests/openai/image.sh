#!/usr/bin/env bash
# Builds the image `openai` of the whole-VM tests: image `python` with the package openai, as pip would have installed it.
#   tests/openai/image.sh PIP
# Output: build/test-images/openai.erofs and its manifest, apart from the images that agents of users have.
# shellcheck source=../../guest-images/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../guest-images/lib.sh"

pip=$(realpath "${1:?usage: image.sh PIP}")
here=$repo/tests/openai
base=$build/images/python
need fsck.erofs erofs-utils
need fakeroot fakeroot
[ -s "$base.erofs" ] || die "$base.erofs is missing. Build it with: make images"

build_image() {
    local root=$work/root image=$work/out/openai.erofs
    PATH=$PATH:/usr/sbin fsck.erofs --extract="$root" --preserve-perms --no-preserve-owner "$base.erofs"
    "$pip" install --quiet --disable-pip-version-check --require-hashes --no-deps --no-compile --only-binary :all: \
        --implementation cp --python-version 3.11 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
        --target "$root/usr/local/lib/python3.11/dist-packages" -r "$here/requirements.txt"
    # Compiled ahead by the interpreter that will read it: an agent's disk is read-only, and compiling takes a while where the
    # processor is emulated.
    PYTHONHOME=$root/usr "$root/lib64/ld-linux-x86-64.so.2" --library-path "$root/usr/lib/x86_64-linux-gnu" "$root/usr/bin/python3.11" \
        -S -s -m compileall -q --invalidation-mode unchecked-hash -s "$root" -p / "$root/usr/local/lib"
    # Owners and modes as in image `python`.
    # shellcheck disable=SC2016 # the inner shell expands it
    fakeroot -- bash -c '
        chown -Rh 0:0 "$1" && chown -Rh 1000:1000 "$1/home/agent" &&
        PATH=$PATH:/usr/sbin mkfs.erofs -x-1 -Eforce-inode-compact -T"$SOURCE_DATE_EPOCH" "$2" "$1" >/dev/null' - "$root" "$image"
    printf '{"manifest_version": 1, "name": "openai", "digest": "sha256:%s", "size": %s, "description": "%s", "built_from": ["%s"], "created_unix": %s}\n' \
        "$(sha256sum "$image" | cut -c1-64)" "$(stat -c %s "$image")" "python with the package openai, for tests" \
        "$(sed -n 's/^\(openai==[^ ]*\).*/\1/p' "$here/requirements.txt")" "$SOURCE_DATE_EPOCH" >"$work/out/openai.json"
}

key=$(key_of "${BASH_SOURCE[0]}" "$here/requirements.txt" "$base.json" </dev/null)
step image-openai "image openai, for tests" "$key" 500 build_image "$build"/test-images/openai.{erofs,json}
