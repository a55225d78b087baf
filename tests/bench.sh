#!/usr/bin/env bash
# Measures every figure of the README: prints a table, writes build/bench.json. Needs what `make all` makes.
#   tests/bench.sh [--quick] [--only boot,exec,…]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
out="$root/build/bench"
mkdir -p "$out"

# The peer: Debian's QEMU with its libraries and firmware, as a tree that the emulated host can mount. On a
# host with usable KVM the same tree serves.
peer="$out/peer"
if [ ! -e "$peer/complete" ]; then
    rm -rf "$peer"
    tests/step.sh "peer (Debian's QEMU)" mmdebstrap --quiet --variant=extract --include=qemu-system-x86 bookworm "$peer"
    touch "$peer/complete"
fi

install -m 0755 build/bin/ark-inference "$peer/ark-inference"

echo "── figures of VMs"
if build/bin/ark-vmm probe >/dev/null 2>&1; then tree=$peer; else tree=/mnt/test/tree; fi
ARK_TEST_TREE=$peer tests/on-kvm.sh bench vm --peer "$tree" "$@" | tee "$out/vm.txt" | grep -v '^{' || true
grep '^{' "$out/vm.txt" > "$out/vm.json" || { echo "bench.sh: the VM figures did not finish" >&2; exit 1; }

echo "── figures of the emulated host"
ARK_ASSETS="$root/build" target/x86_64-unknown-linux-gnu/release/ark-bench machine > "$out/machine.json"

echo "── figures of the control plane alone"
ARK_ASSETS="$root/build" target/x86_64-unknown-linux-gnu/release/ark-bench control-plane > "$out/control-plane.json"

echo "── figures of the inference server alone"
ARK_ASSETS="$root/build" target/x86_64-unknown-linux-gnu/release/ark-bench inference --model agents/router-model/model/router.gguf > "$out/inference.json"

# The last complete `make run` from an empty clone, step by step: each step's time until the first program's output.
echo "── fresh clone to the first program's output (the longest run of each step in build/steps.tsv)"
if grep -q 'first output' build/steps.tsv; then
    awk -F '\t' '$2 == "first output" { exit } { if (!($2 in t)) order[++n] = $2; if ($3 > t[$2]) t[$2] = $3; }
        END { for (i = 1; i <= n; i++) sum += t[order[i]];
              for (i = 1; i <= n; i++) printf "%-32s %8.1f s %5.1f %%\n", order[i], t[order[i]], 100 * t[order[i]] / sum;
              printf "%-32s %8.1f s\n", "together", sum }' build/steps.tsv | tee "$out/fresh.txt"
else
    echo "none: \`make run\` was not done in this clone yet" | tee "$out/fresh.txt"
fi

python3 - "$out" {vm,machine,control-plane,inference}.json <<'PY'
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[1])
figures = [f for name in sys.argv[2:] for f in json.loads((out / name).read_text())["figures"]]
fresh = [line.rsplit(None, 4)[0:2] for line in (out / "fresh.txt").read_text().splitlines() if "%" in line]
result = {"taken_unix": int(time.time()), "figures": figures, "fresh_clone_seconds": {k: float(v) for k, v in fresh}}
(out.parent / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
missed = [f["name"] for f in figures if not f["holds"]]
print(f"written: build/bench.json; {len(figures)} figures" + (f"; MISSED: {', '.join(missed)}" if missed else ", every bound holds"))
PY
