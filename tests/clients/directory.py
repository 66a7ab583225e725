"""An OpenLDAP with a slow entry, and a client of it: server ADDRESS SECONDS, or client ADDRESS [STRATEGY of ldap3].

The client does what each line that it reads says:

search          looks for an entry, says `found`
slow            looks for the entry that takes so many seconds, says `found`
abandon         abandons an operation, which has no answer, says `abandoned`
synchronise     waits for changes as a replica does, on a connection of its own
"""

import os
import socket
import subprocess
import sys
import tempfile
import time

SUFFIX = "dc=test"
CONFIGURATION = """\
include /etc/ldap/schema/core.schema
modulepath /usr/lib/ldap
moduleload back_mdb
moduleload syncprov
moduleload retcode
pidfile {directory}/pid
database mdb
suffix "{suffix}"
rootdn "cn=admin,{suffix}"
rootpw secret
directory {directory}
overlay syncprov
overlay retcode
retcode-parent "cn=codes,{suffix}"
retcode-item "cn=slow" 0x00 sleeptime={seconds}
"""


def serve(address, seconds):
    with tempfile.TemporaryDirectory() as directory:
        file = os.path.join(directory, "slapd.conf")
        with open(file, "w") as configuration:
            text = CONFIGURATION.format(directory=directory, suffix=SUFFIX, seconds=seconds)
            configuration.write(text)
        entry = f"dn: {SUFFIX}\nobjectClass: dcObject\nobjectClass: organization\ndc: test\no: test\n"
        subprocess.run(["slapadd", "-f", file], input=entry.encode(), check=True)
        slapd = subprocess.Popen(["slapd", "-d", "0", "-h", f"ldap://{address}", "-f", file])
        while slapd.poll() is None:
            try:
                socket.create_connection((address, 389)).close()
                print("ready", flush=True)
                break
            except OSError:
                time.sleep(0.05)
        slapd.wait()


def ask(address, strategy="SYNC"):
    import ldap3

    connection = ldap3.Connection(address, f"cn=admin,{SUFFIX}", "secret", auto_bind=True, client_strategy=strategy)
    print("port:", connection.socket.getsockname()[1], flush=True)

    def search(base):
        connection.search(base, "(objectClass=*)", ldap3.BASE)
        return "found"

    def abandon():
        # AbandonRequest of RFC 4511, of a message that is not there.
        connection.socket.sendall(bytes.fromhex("3006020107500163"))
        return "abandoned"

    def synchronise():
        # It would outlive this process.
        command = ["setpriv", "--pdeathsig", "KILL", "ldapsearch", "-x", "-LLL", "-H", f"ldap://{address}", "-b", SUFFIX, "-E", "!sync=rp"]
        return subprocess.run(command, stdout=subprocess.DEVNULL).returncode

    actions = {
        "search": lambda: search(SUFFIX),
        "slow": lambda: search(f"cn=slow,cn=codes,{SUFFIX}"),
        "abandon": abandon,
        "synchronise": synchronise,
    }
    for line in sys.stdin:
        try:
            print(actions[line.strip()](), flush=True)
        except (OSError, ldap3.core.exceptions.LDAPException) as error:
            print("error:", type(error).__name__, flush=True)


{"server": serve, "client": ask}[sys.argv[1]](*sys.argv[2:])
