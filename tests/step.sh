#!/usr/bin/env bash
# Runs one build step: says what runs, shows that it is alive, and notes how long it took in build/steps.tsv.
#   tests/step.sh NAME COMMAND…     runs COMMAND
#   tests/step.sh --first-output    notes that the demonstration's first program has printed
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$root/build"
log="$root/build/steps.tsv"
if [ "$1" = --first-output ]; then
    printf '%s\tfirst output\t0\n' "$(date +%s.%N)" >> "$log"
    exit 0
fi
name=$1
shift
begin=$(date +%s.%N)
echo "── $name"
# A line every half minute says that a silent step is alive.
(
    waited=0
    while sleep 30; do
        waited=$((waited + 30))
        echo "   … $name: ${waited} s"
    done
) &
ticker=$!
trap 'kill "$ticker" 2>/dev/null || true' EXIT
code=0
"$@" || code=$?
end=$(date +%s.%N)
printf '%s\t%s\t%s\n' "$end" "$name" "$(awk -v a="$begin" -v b="$end" 'BEGIN { printf "%.1f", b - a }')" >> "$log"
[ "$code" = 0 ] || echo "make: the step \"$name\" failed (exit code $code); what it printed above says why" >&2
exit "$code"
