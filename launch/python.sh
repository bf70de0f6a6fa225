# Sourced: sets $python to the interpreter that runs the project. An active virtual environment wins, then the
# checkout's own .venv, then python3 on PATH. Expects $root, the checkout.
if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
  python=$VIRTUAL_ENV/bin/python
elif [ -x "$root/.venv/bin/python" ]; then
  python=$root/.venv/bin/python
else
  python=$(command -v python3) || { echo "no python3 on PATH: run launch/quickstart.sh, or activate an environment" >&2; exit 78; }
fi
