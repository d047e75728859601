#!/usr/bin/env bash
# Finds a Python that can run the set-up and hands over to setup_env.py.
#
#   scripts/setup.sh                      what `make setup` calls
#   PYTHON=/path/to/python scripts/setup.sh
set -euo pipefail

new_enough='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))'
found=""
for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
    if "$candidate" -c "$new_enough" >/dev/null 2>&1; then
        found=$candidate
        break
    fi
done

if [ -z "$found" ]; then
    wanted=${PYTHON:-python3}
    version=$("$wanted" -V 2>&1 | head -n 1 || true)
    cat >&2 <<MESSAGE
set-up failed: rlalign needs Python 3.11 to 3.14 (tested: 3.11); $wanted says: ${version:-nothing}
fix: install one (Debian, Ubuntu: apt install python3 python3-venv) and name it: make setup PYTHON=/path/to/python3.11
MESSAGE
    exit 1
fi

exec "$found" "$(dirname "${BASH_SOURCE[0]}")/setup_env.py" "$@"
