#!/bin/bash
# Makes the bundled model anew: vocabulary, training, GGUF, evaluation, the numbers in the card.
#   train.sh             everything; minutes on two cores
#   train.sh evaluate    only measures the file that is there and writes the numbers down
#   train.sh test        the tests, the file against its card among them
# What it needs from PyPI it puts into build/router-model, once. The same seed gives the same file with the same
# versions on the same kind of processor; others add up in another order.
set -euo pipefail
cd "$(dirname "$0")"
venv=../../build/router-model
python() { "$venv/bin/python" "$@"; }
# $1 is the file of requirements; a change of it installs anew.
need() {
    [ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
    cmp -s "$1" "$venv/$1" || { "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$1"; cp "$1" "$venv/$1"; }
}
case "${1:-all}" in
    all)
        need requirements.txt
        need requirements-train.txt
        mkdir -p model
        python -m router_model train
        python -m router_model evaluate --record
        ;;
    evaluate)
        need requirements.txt
        python -m router_model evaluate --record
        ;;
    test)
        need requirements.txt
        python -m unittest discover --start-directory tests
        ;;
    *)
        echo "train.sh: unknown word $1; say nothing, evaluate or test" >&2
        exit 2
        ;;
esac
