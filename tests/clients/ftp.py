"""An FTP server whose files come slowly, and a client that downloads one: server ADDRESS SECONDS, or client ADDRESS [noop].

A file takes so many seconds. The client says what the server said at the end of the transfer, or the error. It sends NOOP
every second meanwhile where it is told to.
"""

import ftplib
import os
import sys
import tempfile
import time

BYTES_PER_SECOND = 100_000


def serve(address, seconds):
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler, ThrottledDTPHandler
    from pyftpdlib.servers import FTPServer

    class Slow(ThrottledDTPHandler):
        read_limit = write_limit = BYTES_PER_SECOND
        auto_sized_buffers = False
        ac_out_buffer_size = 8192

    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, "file"), "wb") as file:
            file.write(b"x" * BYTES_PER_SECOND * int(seconds))
        handler = FTPHandler
        handler.authorizer, handler.dtp_handler = DummyAuthorizer(), Slow
        handler.authorizer.add_anonymous(directory)
        server = FTPServer((address, 21), handler)
        print("ready", flush=True)
        server.serve_forever()


def ask(address, noop=None):
    ftp = ftplib.FTP(address)
    ftp.login()
    print("port:", ftp.sock.getsockname()[1], flush=True)
    try:
        ftp.voidcmd("TYPE I")
        last, sent = time.monotonic(), 0
        with ftp.transfercmd("RETR file") as transfer:
            while transfer.recv(8192):
                if noop and time.monotonic() - last > 1:
                    last, sent = time.monotonic(), sent + 1
                    ftp.putcmd("NOOP")
        answers = [ftp.voidresp() for _ in range(sent + 1)]
        print(next(answer for answer in answers if answer.startswith("226")), flush=True)
        ftp.sock.recv(1)
    except (OSError, EOFError) as error:
        print(type(error).__name__, flush=True)


{"server": serve, "client": ask}[sys.argv[1]](*sys.argv[2:])
