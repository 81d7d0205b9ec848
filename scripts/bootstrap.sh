# SPDX-License-Identifier: GPL-2.0-or-later
# Sourced by the scripts beside it: makes sure of a Python environment with qvis
# in it. Needs nothing but a shell, and a Debian that may be told to install.
#
#   root=<the checkout>; . "$root/scripts/bootstrap.sh"; bootstrap [EXTRA]
#
# leaves the environment's folder in $venv. The second time it costs a few
# milliseconds: the environment's stamp is a copy of the pyproject.toml that it was
# made from, so a comparison decides.

bootstrap() {
    extra=${1:-}
    if [ -w "$root" ]; then
        venv=$root/.venv
    else
        # One for each checkout, since the package is installed in place.
        venv=${QVIS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qvis}/venv$(echo "$root" | tr / -)
    fi
    _bootstrap_done && return
    mkdir -p "$venv" || exit 122
    # Whoever comes second finds it done.
    (
        flock -n 9 || {
            echo "qvis: waiting for another process to make the Python environment" >&2
            flock 9
        }
        _bootstrap_done || _bootstrap_make
    ) 9>"$venv/qvis-lock" || exit $?
}

_bootstrap_done() {
    # An interpreter that was removed, or a checkout that was moved, leaves an
    # environment that does not work.
    [ -x "$venv/bin/python" ] && { read -r place <"$venv/qvis-root"; } 2>/dev/null &&
        [ "$place" = "$root" ] && cmp -s "$root/pyproject.toml" "$venv/qvis-stamp${extra:+-$extra}"
}

_bootstrap_make() {
    log=$venv/qvis-setup.log
    : >"$log"
    python=$(_bootstrap_python)
    if [ -z "$python" ]; then
        _bootstrap_install python3 python3-venv
        python=$(_bootstrap_python)
        [ -n "$python" ] || _bootstrap_fail "no Python >= 3.11 with venv here, nor in the packages"
    fi
    echo "qvis: making a Python environment in $venv (log: $log)" >&2
    rm -f "$venv"/qvis-stamp* "$venv/qvis-root"
    # Not with --clear, which would remove the lock. What is installed stays, so
    # that a changed pyproject.toml does not pull the rug from a running qvis.
    "$python" -m venv "$venv" >>"$log" 2>&1 &&
        "$venv/bin/python" -m pip install --editable "$root${extra:+[$extra]}" >>"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        _bootstrap_fail "the Python environment could not be made (log: $log)"
    }
    # Last: an environment without them was not finished.
    echo "$root" >"$venv/qvis-root"
    for stamp in "$venv/qvis-stamp" ${extra:+"$venv/qvis-stamp-$extra"}; do
        cp "$root/pyproject.toml" "$stamp.new" && mv "$stamp.new" "$stamp" || exit 122
    done
}

_bootstrap_fail() {
    echo "qvis: $*" >&2
    exit 122
}

_bootstrap_python() {
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
}

_bootstrap_install() {
    if [ "$(id -u)" = 0 ]; then
        sudo=
    elif sudo -n true 2>/dev/null; then
        sudo="sudo -n"
    else
        _bootstrap_fail "run this first: sudo apt-get install --yes $*"
    fi
    command -v apt-get >/dev/null || _bootstrap_fail "install Python >= 3.11 with venv first"
    echo "qvis: installing $* (log: $log)" >&2
    {
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get update &&
            $sudo env DEBIAN_FRONTEND=noninteractive apt-get install --yes \
                --no-install-recommends "$@"
    } >>"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        _bootstrap_fail "could not install $* (log: $log)"
    }
}
