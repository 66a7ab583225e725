# Run by packages.rs as root, with the Debian packages to install as arguments. A developer's
# machine does not get a running, or at the next start running, database or SSH server from it.
set -eu
export DEBIAN_FRONTEND=noninteractive

install() {
    apt-get --yes --quiet -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@"
}

enabled_services() {
    find /etc/systemd/system -path '*.wants/*' -type l 2>/dev/null | sort | tr '\n' ' '
}

# Debian's maintainer scripts ask this file whether they may start a service. Where the machine has
# one of its own, that one decides.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

before=$(enabled_services)
if ! install "$@"; then
    echo 'xtask: refreshing the package lists and trying again' >&2
    apt-get --yes --quiet -o DPkg::Lock::Timeout=300 update
    install "$@"
fi

if command -v systemctl >/dev/null; then
    for link in $(enabled_services); do
        case " $before " in
        *" $link "*) ;;
        *) systemctl disable --quiet "$(basename "$link")" ;;
        esac
    done
fi
