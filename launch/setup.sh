# Sourced by launch/quickstart.sh and launch/test.sh: what a bare machine needs first. Expects $root, the checkout.

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
refuse() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 78
}

# Disk space below $root, in whole GiB that must be free.
need_disk() {
  local free
  free=$(($(df -Pk "$root" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
  [ "$free" -ge "$1" ] || refuse "$free GiB free in $root, $1 GiB are needed: make room or clone elsewhere"
}

# Prints an interpreter that is new enough and can make virtual environments.
find_python() {
  local least name
  least=$(sed -n 's/^requires-python = ">=3\.\([0-9]*\)".*/\1/p' "$root/pyproject.toml")
  for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3; do
    if "$name" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, $least))" 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  refuse "no Python 3.$least or newer with the venv module on PATH: install python3 and python3-venv, or set PYTHON"
}

# Runs a command that prints much, shows that it goes on, and shows its output only if it fails.
quietly() {
  local log status=0 started=$SECONDS
  log=$(mktemp)
  "$@" >"$log" 2>&1 &
  local running=$!
  trap 'kill "$running" 2>/dev/null' EXIT  # Ctrl-C does not reach what runs in the background
  # A line every 20 seconds: enough for a person, little enough for a log.
  while kill -0 "$running" 2>/dev/null; do
    sleep 1
    [ $(((SECONDS - started) % 20)) -ne 19 ] || printf '  ... %d s\n' $((SECONDS - started))
  done
  wait "$running" || status=$?
  trap - EXIT
  [ "$status" -eq 0 ] || tail -n 40 "$log" >&2
  rm -f "$log"
  return "$status"
}

# Makes $root/.venv, unless an environment is active, and installs the project with the extras named in $1.
# What has been installed is remembered, so that the next call costs nothing. Sets $python.
install_project() {
  local environment=${VIRTUAL_ENV:-$root/.venv} stamp wanted
  if [ ! -x "$environment/bin/python" ]; then
    local base
    base=$(find_python)
    need_disk 8  # torch comes with its CUDA libraries where the index has no CPU build
    "$base" -m venv "$environment"
  fi
  python=$environment/bin/python
  stamp=$environment/.kandinsky-dist-installed
  wanted="$1 $root $(cksum <"$root/pyproject.toml")"
  if [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp"; then
    echo "  already installed in $environment"
    return
  fi
  echo "  into $environment, a minute or two"
  # pip would compile every module of every package, on one core, and for longer than all else that it does. Python
  # compiles the few that are imported when they are.
  quietly "$python" -m pip install --disable-pip-version-check --no-compile -e "$root[$1]"
  echo "$wanted" >>"$stamp"
}
