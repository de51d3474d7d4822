#!/bin/bash
# Installs the packages of requirements.txt for an interpreter, and rejects files whose SHA-256 is not in it:
#     tools/install_pinned.sh .venv/bin/python
# A call of pip downloads all its files to TMPDIR before it installs the first, and removes them when it ends. All in one
# call need half as much disk again; so the large packages come in separate calls, by pattern. What is installed already is
# not downloaded again: repeat it after an interruption.
set -euo pipefail
python=$1
requirements=$(dirname "${BASH_SOURCE[0]}")/../requirements.txt

install() {  # PATTERN OPTION...: the requirements whose lines begin with the pattern, with their hashes
  "$python" -m pip install --require-hashes "${@:2}" \
    --requirement <(awk -v pattern="^$1" '/^[^ #]/ { wanted = $0 ~ pattern } wanted' "$requirements")
}

install '(packaging|setuptools|wheel)=='  # build the source archives below, so that no build downloads anything
install '(nvidia|cuda)-' --no-deps
install '(torch|triton)' --no-deps
"$python" -m pip install --require-hashes --no-build-isolation --requirement "$requirements"
