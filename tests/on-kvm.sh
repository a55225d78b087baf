#!/usr/bin/env bash
# Runs a program of this crate where VMs can run: on this host when its KVM is usable, else inside an emulated host of its
# own. Says which. Exit code: the program's.
#   tests/on-kvm.sh vm [ARGUMENTS]       the whole-VM tests, with build/test-images
#   tests/on-kvm.sh bench [ARGUMENTS]    the benchmarks
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
what=$1
shift
cd "$root"

case $what in
    vm)
        build=(test --test vm --no-run) name='vm-[0-9a-f]+'
        # Images that only tests have: `make test-images`.
        [ ! -d build/test-images ] || export ARK_TEST_TREE=$root/build/test-images
        ;;
    bench) build=(build --release --bin ark-bench) name=ark-bench ;;
    *) echo "on-kvm.sh: what is '$what'?" >&2; exit 2 ;;
esac
binary=$("${CARGO:-cargo}" "${build[@]}" --workspace --locked --message-format=json |
    sed -En "s#.*\"executable\":\"([^\"]*/$name)\".*#\1#p")
[ -x "$binary" ] || { echo "on-kvm.sh: cargo built no program for '$what'" >&2; exit 1; }

if probe=$(build/bin/ark-vmm probe 2>&1); then
    echo "on this host: $probe"
    # They would set the clock of a host that is somebody's.
    [ "$what" != vm ] || echo "not run here: clock::, which sets the host's clock; where KVM is not usable it runs in an emulated host"
    ARK_ASSETS="$root/build" exec "$binary" "$@"
fi
echo "in an emulated host, because: $probe"

told=()
# A machine of its own: another state directory and port than the user's.
scratch=$(mktemp -d)
export ARK_HOST=machine ARK_STATE="$scratch/state" ARK_RUN="$scratch/run"
ARK_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export ARK_PORT
trap 'build/bin/ark machine stop >/dev/null 2>&1 || true; rm -rf "$scratch"' EXIT
mkdir "$scratch/disk"
cp "$binary" "$scratch/disk/program"
if [ -n "${ARK_TEST_TREE:-}" ]; then
    cp -a "$ARK_TEST_TREE" "$scratch/disk/tree"
    told+=(ARK_TEST_TREE=/mnt/test/tree)
fi
mkfs.erofs "$scratch/test.erofs" "$scratch/disk" >/dev/null
rm -rf "$scratch/disk"
build/bin/ark machine start --attach "$scratch/test.erofs" --memory "${ARK_TEST_MEMORY:-8192}"
# What the long runs are told, where it is said.
for name in ARK_CHAOS_SEED ARK_CHAOS_ROUNDS ARK_SOAK_ROUNDS; do
    [ -z "${!name:-}" ] || told+=("$name=${!name}")
done
there() {
    build/bin/ark machine shell -- env ARK_ASSETS=/opt/ark TMPDIR=/tmp HOME=/root ARK_OWN_CLOCK=1 "${told[@]}" /mnt/test/program "$@"
}
there "$@"
# What sets the clock of its host runs alone, and nowhere else.
[ "$what" != vm ] || [ $# != 0 ] || there --ignored --test-threads 1 clock::
