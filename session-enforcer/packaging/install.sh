#!/bin/sh
# Installs session-enforcer from the unpacked tarball, where there is no package for the system.
#
#   ./install.sh              into /usr/local, with a service for systemd
#   ./install.sh --uninstall  takes it out again; configuration and audit stay
#
# PREFIX is where the program goes, DESTDIR is put before every path (nothing is started or made
# outside of it).
set -eu
cd "$(dirname "$0")"
prefix=${PREFIX:-/usr/local}
root=${DESTDIR:-}
unit=$root/etc/systemd/system/session-enforcer.service
# journald looks nowhere else below /usr/local.
catalog=/usr/local/lib/systemd/catalog/session-enforcer.catalog

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

[ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "must run as root; try sudo ./install.sh"

has_systemd() {
    [ -z "$root" ] && [ -d /run/systemd/system ]
}

uninstall() {
    if has_systemd && [ -e "$unit" ]; then
        systemctl disable --now session-enforcer.service
    fi
    if [ -z "$root" ] && [ -x "$prefix/bin/session-enforcer" ]; then
        "$prefix/bin/session-enforcer" detach
    fi
    for page in man/*; do
        rm -f "$root$prefix/share/man/man1/${page#man/}" "$root$prefix/share/man/man5/${page#man/}"
    done
    rm -f "$root$prefix/bin/session-enforcer" "$unit" \
        "$root/etc/logrotate.d/session-enforcer" "$root$catalog" \
        "$root$prefix/share/bash-completion/completions/session-enforcer" \
        "$root$prefix/share/zsh/site-functions/_session-enforcer" \
        "$root$prefix/share/fish/vendor_completions.d/session-enforcer.fish"
    if has_systemd; then
        systemctl daemon-reload
        journalctl --update-catalog
    fi
    echo "removed; /etc/session-enforcer, /var/log/session-enforcer and the user stay"
}

# FILE MODE DESTINATION
place() {
    mkdir -p "$root$(dirname "$3")"
    install -m "$2" "$1" "$root$3"
}

make_user() {
    if id session-enforcer >/dev/null 2>&1; then return; fi
    useradd --system --user-group --no-create-home --home-dir /var/lib/session-enforcer \
        --shell /usr/sbin/nologin session-enforcer
}

if [ "${1:-}" = --uninstall ]; then
    uninstall
    exit 0
fi
[ $# = 0 ] || fail "unknown argument $1; there is --uninstall"

# A package's file must not be hidden by another copy of another version.
if [ -z "$root" ] && [ -e /usr/lib/systemd/system/session-enforcer.service ]; then
    fail "the package session-enforcer is installed; remove it first"
fi

place session-enforcer 755 "$prefix/bin/session-enforcer"
for page in man/*.1.gz; do place "$page" 644 "$prefix/share/man/man1/${page#man/}"; done
for page in man/*.5.gz; do place "$page" 644 "$prefix/share/man/man5/${page#man/}"; done
place completions/session-enforcer.bash 644 \
    "$prefix/share/bash-completion/completions/session-enforcer"
place completions/_session-enforcer 644 "$prefix/share/zsh/site-functions/_session-enforcer"
place completions/session-enforcer.fish 644 \
    "$prefix/share/fish/vendor_completions.d/session-enforcer.fish"
place session-enforcer.logrotate 644 /etc/logrotate.d/session-enforcer
place session-enforcer.catalog 644 "$catalog"
mkdir -p "$(dirname "$unit")"
sed "s|/usr/bin/session-enforcer|$prefix/bin/session-enforcer|" session-enforcer.service >"$unit"
chmod 644 "$unit"
if [ ! -e "$root/etc/session-enforcer/config.toml" ]; then
    place config.toml 644 /etc/session-enforcer/config.toml
fi

if [ -z "$root" ]; then make_user; fi
if has_systemd; then
    systemctl daemon-reload
    journalctl --update-catalog
    # The new daemon takes over the sessions of the one before.
    systemctl try-restart session-enforcer.service
    echo "installed; start it with: systemctl enable --now session-enforcer"
fi
