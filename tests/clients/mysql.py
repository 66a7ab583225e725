"""A client of MariaDB that sends what it is told: ADDRESS. It says `port: NUMBER` and reads lines:

ping                    COM_PING
query SQL               COM_QUERY
prepared SQL            COM_STMT_PREPARE, COM_STMT_EXECUTE, COM_STMT_CLOSE, the last of which has no answer

After each it says `done`, or the error. It speaks the protocol itself: which commands are sent, and in how many bytes, is
what it is about, and a library hides that.
"""

import socket
import struct
import sys

LONG_PASSWORD, PROTOCOL_41, SECURE_CONNECTION = 0x1, 0x200, 0x8000
stream = socket.create_connection((sys.argv[1], 3306))


def exactly(length):
    found = b""
    while len(found) < length:
        part = stream.recv(length - len(found))
        if not part:
            raise ConnectionError("the end")
        found += part
    return found


def packet():
    head = exactly(4)
    payload = exactly(int.from_bytes(head[:3], "little"))
    if payload[:1] == b"\xff":
        raise RuntimeError(payload[9:].decode())
    return payload


def send(payload, sequence=0):
    stream.sendall(len(payload).to_bytes(3, "little") + bytes([sequence]) + payload)


def until_end(count=1):
    """So many packets that end a list of columns or rows (EOF)."""
    while count:
        found = packet()
        count -= found[:1] == b"\xfe" and len(found) < 9


def query(sql):
    send(b"\x03" + sql.encode())
    if packet()[:1] != b"\x00":
        until_end(2)


def prepared(sql):
    send(b"\x16" + sql.encode())
    _, statement, columns, parameters = struct.unpack("<BIHH", packet()[:9])
    until_end(bool(columns) + bool(parameters))
    send(b"\x17" + struct.pack("<IBI", statement, 0, 1))
    if packet()[:1] != b"\x00":
        until_end(2)
    send(b"\x19" + struct.pack("<I", statement))


def ping(_):
    send(b"\x0e")
    packet()


packet()
flags = LONG_PASSWORD | PROTOCOL_41 | SECURE_CONNECTION
send(struct.pack("<IIB23x", flags, 1 << 24, 33) + b"root\0\0", 1)
packet()
print("port:", stream.getsockname()[1], flush=True)
for line in sys.stdin:
    command, _, rest = line.strip().partition(" ")
    try:
        {"ping": ping, "query": query, "prepared": prepared}[command](rest)
        print("done", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
