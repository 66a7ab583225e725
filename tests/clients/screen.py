"""A VNC server, and a viewer of it with a screen of its own: server ADDRESS, or client ADDRESS.

The server changes its screen twice a second until a line is read from its input, or for ever.
"""

import os
import socket
import subprocess
import sys
import time


# What is started outside of the cgroup would outlive this process.
WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]


def screen(number, *options):
    """A display that is reached over TCP: sockets in the file system would be everybody's."""
    command = ["Xvnc", f":{number}", "-SecurityTypes", "None", "-nolock", "-ac", *options]
    command += ["-nolisten", "unix", "-nolisten", "local", "-listen", "tcp", "-geometry", "200x200"]
    process = subprocess.Popen(WITH_PARENT + command)
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", 6000 + number)).close()
            break
        except OSError:
            time.sleep(0.05)
    return dict(os.environ, DISPLAY=f"127.0.0.1:{number}")


def serve(address, changes):
    environment = screen(1, "-rfbport", "5900", "-interface", address)
    print("ready", flush=True)
    while changes == "changes":
        for colour in ("red", "blue"):
            subprocess.run(["xsetroot", "-solid", colour], env=environment)
            time.sleep(0.5)
    time.sleep(3600)


def ask(address):
    environment = screen(2, "-rfbport", "5901")
    viewer = ["xtigervncviewer", "-SecurityTypes=None", "-ReconnectOnError=0", f"{address}::5900"]
    process = subprocess.Popen(WITH_PARENT + viewer, env=environment)
    digits = bytes(map(int, address.split(".")))[::-1].hex().upper()
    port = None
    while port is None and process.poll() is None:
        time.sleep(0.1)
        for table in ("tcp", "tcp6"):
            for line in open(f"/proc/net/{table}"):
                fields = line.split()
                if fields[2].endswith(f"{digits}:{5900:04X}") and fields[3] == "01":
                    port = int(fields[1].split(":")[1], 16)
    print("port:", port, flush=True)
    print("ended", process.wait(), flush=True)


{"server": serve, "client": ask}[sys.argv[1]](*sys.argv[2:])
