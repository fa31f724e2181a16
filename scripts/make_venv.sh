#!/usr/bin/env bash
# Makes or updates the virtual environment that the journey runs in: pinned packages, every wheel checked by its hash.
# make_venv.sh VENV NAME installs what requirements/NAME.txt lists, and notes it as VENV/locks/NAME.txt. aiperf and
# clients need other versions than we do, so they go into separate virtual environments: VENV/aiperf, VENV/clients.
# make_venv.sh --check   says whether it could, and with which interpreter; installs nothing.
set -euo pipefail
venv=$1 name=${2:-}
# Names the list whose installation runs: if pip is killed half-way, it may leave a package that it takes for complete.
# The next call installs that list again over what is there, and no other list.
unfinished=$venv/unfinished

report() { # title, what was seen, what to do, command
    printf '\n-- %s ----------------------------------------\n\n%s\n\n%s\n\n    %s\n\n' "$@" >&2
    exit 1
}

# The first interpreter that works: a name on PATH may be a shim that only prints an error.
pick_python() {
    for name in python3.12 python3.11 python3; do
        if "$name" -c 'import platform, sys
sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) or platform.python_implementation() != "CPython")' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
}

# Sets base, the interpreter, and version; a report if no interpreter fits.
check() {
    local system libc
    system="$(uname -s) $(uname -m)"
    [ "$system" = "Linux x86_64" ] || report "THIS SYSTEM CANNOT RUN IT" \
        "This is $system; Triton's wheel and the pinned packages are for Linux x86_64." \
        "On such a machine, or in a container on it, type:" "make serve"

    libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || echo "another C library")
    [ "$(printf 'glibc 2.35\n%s\n' "$libc" | sort -V | head -1)" = "glibc 2.35" ] || report "THE C LIBRARY IS TOO OLD" \
        "This system has $libc; Triton's wheel needs glibc 2.35 or later (Ubuntu 22.04, Debian 12)." \
        "On a newer system, or in a container of one, type:" "make serve"

    base=$(pick_python)
    [ -n "$base" ] || report "NO PYTHON 3.11 OR 3.12" \
        "python3 is $(python3 --version 2>&1 || echo missing); CPython 3.11 or 3.12 is needed." \
        "Install one (Ubuntu 24.04 has 3.12, Debian 12 and Ubuntu 22.04 have 3.11), for instance:" \
        "sudo apt-get install python3.11-venv libpython3.11 && make serve"

    version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$base" -c 'import ensurepip, venv' 2>/dev/null || report "PYTHON HAS NO VENV MODULE" \
        "$base ($version) lacks the module venv or ensurepip." \
        "Debian and Ubuntu keep it in its own package:" "sudo apt-get install python$version-venv && make serve"

    # Triton's Python backend links the interpreter as a library.
    "$base" - <<'PY' || report "NO SHARED LIBPYTHON" \
        "Triton's Python backend needs libpython$version.so.1.0; neither $base nor the system has it." \
        "Debian and Ubuntu keep it in its own package:" "sudo apt-get install libpython$version && make serve"
import ctypes, os, sys, sysconfig
name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
if not os.path.exists(os.path.join(sysconfig.get_config_var("LIBDIR") or "", name)):
    try:
        ctypes.CDLL(name)
    except OSError:
        sys.exit(1)
PY
}

make_venv() {
    check
    echo "venv        $base ($version) -> $venv"
    if ! { rm -rf "$venv" && mkdir "$venv" && echo venv >"$unfinished"; } 2>/dev/null; then
        report "THIS TREE CANNOT BE WRITTEN" \
            "make needs to write $PWD/$venv, and user $(id -un) cannot." \
            "Clone the project into a folder of your own, or see who owns this one:" \
            "ls -ld $(printf %q "$PWD") && findmnt --target $(printf %q "$PWD")"
    fi
    "$base" -m venv "$venv" || failed "Python could not make $venv; its own message stands above."
}

# A virtual environment whose pyvenv.cfg is gone is the machine's own Python under another name: nothing may be
# installed into it.
is_venv() { "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; }

failed() {
    report "PACKAGES COULD NOT BE INSTALLED" "$1" "Check the network (or pip's index and proxy settings), then go on with:" "make serve"
}

pip_install() { # list, more options
    "${into:-$venv}/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes "${@:2}" -r "$1"
}

# Every ten seconds one line, or on a terminal the time in place, while a command runs: pip is quiet and takes minutes.
with_progress() { # what, command...
    local what=$1 began=$SECONDS watched=$BASHPID
    shift
    (
        exec 8<> <(:) # never has a line: the shell's own sleep, which ends with the shell
        while { read -rt 1 -u 8 || true; } && kill -0 "$watched" 2>/dev/null; do
            seconds=$((SECONDS - began))
            if [ -t 2 ]; then
                printf '\rvenv        %s: %s s ' "$what" "$seconds" >&2
            elif [ $((seconds % 10)) = 0 ]; then
                echo "venv        $what: $seconds s" >&2
            fi
        done
    ) 9>&- &
    local watcher=$! status=0
    "$@" || status=$?
    kill "$watcher" 2>/dev/null
    wait "$watcher" 2>/dev/null || true
    [ ! -t 2 ] || printf '\r\033[K' >&2
    return $status
}

install() {
    local list=$1 over=()
    [ "$interrupted" != "$list" ] || over=(--ignore-installed)
    echo "$list" >"$unfinished"
    echo "venv        installing requirements/$list.txt (${sizes[$list]:-some MB})"
    with_progress "requirements/$list.txt" pip_install "requirements/$list.txt" "${over[@]}" || {
        rm "$unfinished" # pip ended by itself and leaves no halves
        failed "pip's own message stands above. What was installed stays."
    }
    [ "$interrupted" != "$list" ] || interrupted=
}

# What a first installation downloads, about.
declare -A sizes=([run]="300 MB" [torch]="200 MB for CPUs, 900 MB for CUDA" [torch-cuda]="2.5 GB" [verify]="30 MB" [openai]="20 MB"
    [test]="40 MB" [dev]="80 MB" [aiperf]="300 MB" [clients]="150 MB")

# PyTorch's CPU wheel, if one of the user's indexes or folders has it, because the user added them for that. pip alone
# would take the CUDA wheel, which has gigabytes, if only that one's link names its hash.
cpu_torch() {
    local over=()
    [ "$interrupted" != torch ] || over=(--ignore-installed)
    echo torch >"$unfinished"
    sed -n 's/^torch==[0-9.]*/&+cpu/; /^torch==/,$p' requirements/torch.txt | pip_install /dev/stdin "${over[@]}" 2>/dev/null
}

installed() { # the lock appears complete, or not at all
    cp "requirements/$1.txt" "$venv/locks/$1.writing"
    mv "$venv/locks/$1.writing" "$venv/locks/$1.txt"
}

if [ "$venv" = --check ]; then
    check
    echo "$(uname -sm), $(getconf GNU_LIBC_VERSION), $base ($version)"
    exit
fi

# One make at a time installs; pip inherits the lock, so that it holds even when this script is killed.
exec 9<requirements
if ! flock --nonblock 9; then
    echo "venv        another make is installing; waiting for it"
    flock 9
    [ -e "$unfinished" ] || ! cmp -s "requirements/$name.txt" "$venv/locks/$name.txt" || exit 0
fi
trap 'exit 130' INT TERM # and leave the mark

interrupted=$(cat "$unfinished" 2>/dev/null || true)
if [ -e "$unfinished" ] && [ "${interrupted:-venv}" = venv ] || ! is_venv; then
    make_venv
    interrupted=
fi
mkdir -p "$venv/locks"
case "$interrupted" in
run | torch | torch-cuda) rm -f "$venv/locks/run.txt" ;; # below
"$name" | "") ;;
aiperf | clients) rm -rf "${venv:?}/$interrupted" "$venv/locks/$interrupted.txt" ;;
*)
    rm -f "$venv/locks/$interrupted.txt"
    again=$interrupted # its installation resets it
    install "$again"
    installed "$again"
    ;;
esac
if [ "$name" = run ] || [ ! -e "$venv/locks/run.txt" ]; then
    echo "venv        the pinned packages: about 520 MB to download, 3.7 GB where pip finds PyTorch with CUDA only"
    install run
    with_progress "PyTorch for CPUs" cpu_torch || true
    install torch
    # The CUDA wheel carries no local version in its name; it needs NVIDIA's libraries, the CPU wheel does not.
    if ! "$venv/bin/python" -c 'import importlib.metadata as m, sys; sys.exit(not m.version("torch").endswith("+cpu"))'; then
        install torch-cuda
    fi
    installed run
    # The endpoint's packages too: otherwise the next download would come in the middle of the journey.
    install openai
    installed openai
fi
if [ "$name" = aiperf ] || [ "$name" = clients ]; then
    into=$venv/$name
    "$into/bin/python" -c 'import pip' 2>/dev/null || { rm -rf "$into"; "$venv/bin/python" -m venv "$into"; }
fi
# openai.txt may have come with run.txt, after make had decided to ask for it
fresh() { cmp -s "requirements/$1.txt" "$venv/locks/$1.txt" && [ ! "$venv/locks/run.txt" -nt "$venv/locks/$1.txt" ]; }
if [ "$name" != run ] && ! fresh "$name"; then
    install "$name"
    installed "$name"
fi
rm -f "$unfinished"
