#!/usr/bin/env bash
# DualForce, one command per job. ./run.sh help lists them. Installs into .venv beside this file, nowhere else.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv="$root/.venv"

usage() {
  cat <<'TEXT'
usage: ./run.sh COMMAND [ARGUMENTS]

  setup [EXTRA ...]   create .venv and install (extras: data, dev, download, faces, fused, speech, wan); what is installed is skipped
  demo [OPTIONS]      build shards, train, export and generate from the bundled sample (--help for options)
  train RUN.json --out DIR [OPTIONS]    train on this machine under the deepspeed launcher
  resume RUN.json --out DIR [OPTIONS]   go on from the newest checkpoint in DIR
  export RUNDIR --out MODEL             write a model folder from the newest checkpoint
  generate MODEL --image I --audio A --out V.mp4 [OPTIONS]
  test [PYTEST ARGUMENTS]               linter, formatter, type checker and tests

PYTHON=/path/to/python ./run.sh ... names the interpreter (3.11, 3.12 or 3.13).
TEXT
}

fail() {
  printf 'run.sh: %s\n' "$1" >&2
  exit "${2:-1}"
}

suitable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    suitable "$PYTHON" || fail "PYTHON=$PYTHON: expected Python 3.11, 3.12 or 3.13 with the venv module"
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if suitable "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python found: expected python3.11, python3.12 or python3.13 with the venv module on PATH, or PYTHON=/path/to/python"
}

has_gpu() {
  [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]
}

# What an environment is made for: with another place, build or interpreter it has to be made anew.
identity() {
  printf 'root %s\nbuild %s\npython %s\n' "$root" "$2" "$("$1" -c 'import sys; print(sys.base_prefix, sys.version)')"
}

# Everything that decides what is installed. Extras that are there stay, so that demo and test do not undo each other.
selection() {
  local build=$1
  shift
  { printf 'extra %s\n' "$@"; grep '^extra ' "$venv/installed" 2>/dev/null || true; } | sort -u
  cat "$root/pyproject.toml" "$root/tools/constraints.txt" "$root/tools/constraints-$build.txt"
}

step() {
  local name=$1
  shift
  printf 'run.sh: %s\n' "$name"
  "$@" || fail "setup failed at: $name (the lines above say why; run it again to go on from here)"
}

setup() {
  local python build=cpu made text extras
  python=$(find_python)
  if has_gpu; then build=cuda; fi
  made=$(identity "$python" "$build")
  if [[ ! -f $venv/made-for || $made != "$(<"$venv/made-for")" ]]; then
    step "creating .venv with $python" "$python" -m venv --clear "$venv"
    printf '%s\n' "$made" >"$venv/made-for"
  fi
  text=$(selection "$build" "$@")
  if [[ -f $venv/installed && $text == "$(<"$venv/installed")" ]]; then return; fi
  extras=$(sed -n 's/^extra //p' <<<"$text" | paste -sd, -)
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --constraint "$root/tools/constraints-$build.txt")
  step "installing torch ($build)" "${pip[@]}" torch
  # DS_BUILD_OPS=0: DeepSpeed compiles nothing. Editable: what runs is this checkout.
  step "installing DualForce [$extras]" env DS_BUILD_OPS=0 "${pip[@]}" --editable "$root[$extras]"
  printf '%s\n' "$text" >"$venv/installed"
  printf 'run.sh: installed in %s\n' "$venv"
}

# -P and PYTHONPATH: `tools` is found in the checkout whatever the working directory holds.
run_module() {
  PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$venv/bin/python" -P -m "$@"
}

run_tests() {
  cd -- "$root"
  "$venv/bin/python" -m ruff check . || fail "test: the linter found something"
  "$venv/bin/python" -m ruff format --check . || fail "test: files are not formatted (ruff format . does it)"
  "$venv/bin/python" -m mypy || fail "test: the type checker found something"
  # Two test files at a time: most run one thread, and those that start processes wait for each other half of the time.
  exec "$venv/bin/python" -m pytest -n 2 --dist loadfile "$@"
}

verb=${1:-help}
[[ $# -eq 0 ]] || shift
case $verb in
  setup) setup data "$@" ;;
  demo) setup data; run_module tools.demo "$@" ;;
  train) setup data; run_module tools.launch_local --run "$@" ;;
  resume) setup data; run_module tools.launch_local --resume --run "$@" ;;
  generate | export) setup data; exec "$venv/bin/dualforce" "$verb" "$@" ;;
  test) setup data download faces speech wan dev; run_tests "$@" ;;
  help | -h | --help) usage ;;
  *) usage >&2; fail "unknown command '$verb'" 2 ;;
esac
