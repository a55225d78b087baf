#!/usr/bin/env bash
# Builds build/bin/ark-inference. llama.cpp takes minutes where all the rest takes one, so the program is made anew only when
# something it is made from has changed; with build/ from another machine, neither llama.cpp nor cargo is needed.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../../guest-images/lib.sh
. "$here/../../guest-images/lib.sh"

need cmake cmake
need g++ build-essential

build_program() {
    cd "$repo"
    # The build script of llama.cpp runs anew when this is another than it was. All packages, as the Makefile has it.
    env -u SOURCE_DATE_EPOCH "${CARGO:-cargo}" build --release --workspace --locked --bin ark-inference
    cp "${CARGO_TARGET_DIR:-$repo/target}/x86_64-unknown-linux-gnu/release/ark-inference" "$work/out/"
    chmod 755 "$work/out/ark-inference"
}

mapfile -t sources < <(find "$here" "$repo"/agents/{gguf,link} "$repo"/api/{mcp,types} -type f \( -name '*.rs' -o -name '*.toml' -o -name '*.sh' \) -not -path '*/tests/*' | sort)
key=$(key_of "${sources[@]}" "$repo"/{Cargo.toml,Cargo.lock,.cargo/config.toml} < <(g++ -dumpfullversion))
step ark-inference "ark-inference and llama.cpp" "$key" 2000 build_program "$build/bin/ark-inference"
