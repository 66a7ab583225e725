"""A process that hangs in execve(2): the kernel closes its file of a FUSE file system, and the file system, which is this
script, never answers the FLUSH. Ends when the script is killed."""

import ctypes
import os
import signal
import struct
import subprocess
import sys
import tempfile

LOOKUP, FORGET, GETATTR, OPEN, FLUSH, INIT, INTERRUPT, BATCH_FORGET = 1, 2, 3, 14, 25, 26, 36, 42
ROOT, FILE = 1, 2
CLONE_NEWNS, MS_REC, MS_PRIVATE, PR_SET_PDEATHSIG = 0x20000, 0x4000, 0x40000, 1

libc = ctypes.CDLL(None, use_errno=True)


def check(status):
    if status != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def attributes(inode):
    mode = 0o40755 if inode == ROOT else 0o100644
    return struct.pack("<6Q10I", inode, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def execute(path):
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.open(path, os.O_RDONLY)  # closed by the execve
    os.execv("/bin/sleep", ["sleep", "infinity"])


def serve(device):
    while True:
        request = os.read(device, 1 << 17)
        _, opcode, unique, inode = struct.unpack_from("<IIQQ", request)

        def answer(body=b"", error=0):
            os.write(device, struct.pack("<IiQ", 16 + len(body), error, unique) + body)

        if opcode == INIT:
            answer(struct.pack("<4I2H2I2HI28x", 7, 31, 0, 0, 1, 1, 4096, 1, 16, 0, 0))
        elif opcode == LOOKUP:
            answer(struct.pack("<4Q2I", FILE, 0, 3600, 3600, 0, 0) + attributes(FILE))
        elif opcode == GETATTR:
            answer(struct.pack("<Q2I", 3600, 0, 0) + attributes(inode))
        elif opcode == OPEN:
            answer(struct.pack("<Q2I", 1, 0, 0))
        elif opcode == FLUSH:
            print("hangs", flush=True)
        elif opcode not in (FORGET, BATCH_FORGET, INTERRUPT):
            answer(error=-38)  # ENOSYS


def main():
    if not os.path.exists("/dev/fuse"):
        subprocess.run(["modprobe", "fuse"], check=True)
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    directory = tempfile.mkdtemp()
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
    check(libc.mount(b"hanging_exec", directory.encode(), b"fuse", 0, options.encode()))
    if os.fork() == 0:
        os.close(device)
        execute(f"{directory}/file")
    serve(device)


sys.exit(main())
