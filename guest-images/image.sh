#!/usr/bin/env bash
# Builds one read-only image: image.sh RECIPE
#
# guest-images/RECIPE/recipe.sh says what is inside: `description`, `packages` (Debian, with all they depend on), `without`
# (of those, what the image can do without), `programs` (ours, of build/bin, that compose puts into it) and `compose ROOT`, which
# finishes the tree. Packages are unpacked, not installed: no
# maintainer script runs, so neither root nor a chroot is needed, and the result depends on the package files alone.
# Output: build/images/RECIPE.erofs and its manifest build/images/RECIPE.json.
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name=${1:?usage: image.sh RECIPE}
recipe=$repo/guest-images/$name
[ -f "$recipe/recipe.sh" ] || die "there is no recipe $recipe/recipe.sh"
need mkfs.erofs erofs-utils
need fakeroot fakeroot
need dpkg-deb dpkg
programs=()
# shellcheck source=base/recipe.sh
. "$recipe/recipe.sh"
mapfile -t sources < <(find "$recipe" -type f -not -path '*/__pycache__/*' | sort)
for program in "${programs[@]}"; do
    [ -x "$build/bin/$program" ] || die "build/bin/$program is missing, which image $name contains. Build it with make programs (ark-inference: make inference)"
done
# shellcheck source=tree.sh
. "$repo/guest-images/tree.sh"

build_image() {
    local spec root=$work/root image=$work/out/$name.erofs
    # shellcheck disable=SC2086 # a list of NAME=VERSION
    fetch_debs $specs
    mkdir "$root"
    base_tree "$root"
    for spec in $specs; do unpack "$(deb_file "$spec")" "$root"; done
    compose "$root"
    finish_tree "$root"
    # Owners: root's, except the agent's home. fakeroot lets mkfs see them without being root.
    # shellcheck disable=SC2016 # the inner shell expands it
    fakeroot -- bash -c '
        chown -Rh 0:0 "$1" && chown -Rh 1000:1000 "$1/home/agent" && chmod 1777 "$1/tmp" "$1/var/tmp" && chmod 700 "$1/root" &&
        PATH=$PATH:/usr/sbin mkfs.erofs -d0 -x-1 -Eforce-inode-compact -T"$SOURCE_DATE_EPOCH" -U"$2" "$3" "$1" >/dev/null' \
        - "$root" "$(image_uuid "$specs")" "$image"
    manifest "$specs" "$image" >"$work/out/$name.json"
}

# A UUID that follows from the content, in the form of version 8 (RFC 9562, 5.8: custom).
image_uuid() {
    { cat "${sources[@]}" "${programs[@]/#/$build/bin/}" && printf '%s' "$1"; } | sha256sum |
        sed -E 's/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*/\1-\2-8\3-8\4-\5/'
}

manifest() {
    printf '{\n  "manifest_version": 1,\n  "name": "%s",\n  "digest": "sha256:%s",\n  "size": %s,\n' \
        "$name" "$(sha256sum "$2" | cut -c1-64)" "$(stat -c %s "$2")"
    printf '  "description": "%s",\n  "built_from": [\n' "$description"
    sed 's/.*/    "&"/; $!s/$/,/' <<<"$1"
    printf '  ],\n  "created_unix": %s\n}\n' "$SOURCE_DATE_EPOCH"
}

specs=$(resolve "${packages[@]}")
for spec in "${without[@]}"; do specs=$(grep -v "^$spec=" <<<"$specs"); done
key=$(key_of "${sources[@]}" "${programs[@]/#/$build/bin/}" "$repo"/guest-images/{lib,image,tree}.sh <<<"$specs")
step "image-$name" "image $name" "$key" "$mib" build_image "$build/images/$name.erofs" "$build/images/$name.json"
