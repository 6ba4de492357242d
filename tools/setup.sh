#!/bin/sh
# Make the environment and install the course into it:   sh tools/setup.sh [test]
# Called by the Makefile. Installs the exact versions of requirements.lock. POSIX sh: runs on Linux and macOS.
#   COURSE_VENV  the environment's folder (default .venv)        PYTHON  the Python to use
# With uv on PATH it is used; else Python's own venv and pip. A second run finds a stamp in the environment and does nothing.
set -eu
cd "$(dirname "$0")/.."
venv=${COURSE_VENV:-.venv} extra=${1:-}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
oldest=$(sed -n 's/^min_python *= *//p' settings.ini)

say() { printf '%s\n' "$*"; }
stop() { printf '\nStopped: %s\n\n' "$*" | fold -s -w 100 >&2; exit 1; }
works() { "$@" >/dev/null 2>&1; }
free_mb() { df -Pk . | awk 'NR == 2 {print int($4 / 1024)}'; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

# --- nothing to do? -------------------------------------------------------------------------------------------
wanted="$(cat settings.ini setup.py pyproject.toml requirements.lock | cksum) in $venv"
stamp=$venv/.installed${extra:+-$extra}
have=$(version_of "$venv/bin/python")
case $(cat "$venv/.installed" 2>/dev/null) in
    '' | *" in $venv") ;;
    *) have='' ;;                                  # the folder was moved, and the environment does not work from here
esac
if [ -n "${PYTHON:-}" ] && [ "$have" != "$(version_of "$PYTHON")" ]; then have=''; fi
if [ -n "$have" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

# --- which machine --------------------------------------------------------------------------------------------
if [ "$(uname)" = Darwin ]; then
    mac="macOS $(sw_vers -productVersion 2>/dev/null), $(uname -m)"
    case $mac in
        *x86_64 | "macOS 10."* | "macOS 11."* | "macOS 12."* | "macOS 13."*)
            stop "this machine has $mac. torch and bitsandbytes are built for macOS 14 or newer on Apple silicon only. Use a Linux machine or a container.";;
    esac
fi

# --- which Python ---------------------------------------------------------------------------------------------
minor() { printf '%s' "${1#*.}"; }
python='' seen=''
if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11 python; fi
for p in "$@"; do
    v=$(version_of "$p")
    [ -n "$v" ] || continue
    seen="$seen $p is $v;"
    if [ "${v%%.*}" = 3 ] && [ "$(minor "$v")" -ge "$(minor "$oldest")" ]; then python=$p; break; fi
done
if [ -z "$python" ]; then
    if [ -n "$seen" ]; then found="Python is too old (${seen# }"; found="${found%;})"; else found="no Python was found"; fi
    stop "$found. The course needs Python $oldest or newer. Install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python; others: python.org), or name one you have: PYTHON=/path/to/python3 make lab"
fi

# --- room on the disk -----------------------------------------------------------------------------------------
if [ "$(uname)" = Darwin ]; then need=3000; else need=8000; fi   # Linux builds of torch bring the CUDA libraries
if [ -z "$have" ] && [ "$(free_mb)" -lt "$need" ]; then
    stop "not enough room: $(free_mb) MB are free in $(pwd) and the installation needs about $need MB (torch is most of it). Free some space, or move this folder to a larger disk, and run the same command again."
fi

# --- install --------------------------------------------------------------------------------------------------
if works uv --version; then uv=uv; else uv=''; fi
say "Installing into $venv with $python ($(version_of "$python")) and ${uv:-pip}: about $need MB, one to five minutes on a fast line."

index_answers() {   # ask the same client, with the same settings, for something small
    if [ -n "$uv" ]; then echo pip | works "$uv" pip compile --no-cache --python "$venv/bin/python" -
    else works "$venv/bin/python" -m pip download --no-deps --no-cache-dir --retries 0 --dest "$venv/.probe" pip
    fi
}
failed() {          # say why: no room, no network, or what the installer said
    if [ "$(free_mb)" -lt 500 ]; then
        stop "the disk is full: $(free_mb) MB are left in $(pwd). The installation needs about $need MB. Free some space and run the same command again."
    fi
    if [ -x "$venv/bin/python" ] && ! index_answers; then
        stop "the package index cannot be reached, so nothing can be downloaded. Check the network (and the proxy, if you are behind one) and run the same command again. Once installed, the course needs no network."
    fi
    stop "the installation failed; the lines above say why. Run the same command again when that is mended. To start from nothing: make clean"
}

if [ -z "$have" ]; then
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        stop "$venv is there, but it is no Python environment, so nothing was installed into it. Move it away, or name another folder: COURSE_VENV=/path/to/folder make lab"
    fi
    rm -rf "$venv"
    if [ -n "$uv" ]; then uv venv --quiet --python "$python" "$venv" || failed
    else
        works "$python" -c 'import venv, ensurepip' ||
            stop "$python cannot make environments: its venv module is missing. Install it (Debian, Ubuntu: apt install python3-venv), or install uv, and run the same command again."
        "$python" -m venv "$venv" || failed
    fi
fi
# pip fetches uv first where it can: the same packages then arrive about six times faster
if [ -z "$uv" ] && "$venv/bin/python" -m pip install --quiet --retries 1 --disable-pip-version-check uv 2>/dev/null; then
    uv=$venv/bin/uv
fi
what=.${extra:+[$extra]}
if [ -n "$uv" ]; then "$uv" pip install --python "$venv/bin/python" -c requirements.lock -e "$what" pip || failed
else "$venv/bin/python" -m pip install --retries 1 --disable-pip-version-check -c requirements.lock -e "$what" || failed
fi

printf '%s' "$wanted" > "$venv/.installed"
printf '%s' "$wanted" > "$stamp"
say "Installed. The next start is quick and needs no network."
