"""A TLS 1.3 server that answers late, and a client that is in a hurry: server PORT CERTIFICATE SECONDS, or client
PORT [CERTIFICATE].

The client's first request is in the packet that ends its handshake, so the server's session tickets leave after it.
They contain the certificate of the client, if it has one.
"""

import socket
import ssl
import sys
import time

ANSWER = b"x" * 16384


def serve(port, certificate, seconds):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(certificate)
    listener = socket.create_server(("127.0.0.1", int(port)))
    print("ready", flush=True)
    while True:
        with context.wrap_socket(listener.accept()[0], server_side=True) as stream:
            try:
                while stream.recv(100):
                    time.sleep(float(seconds))
                    stream.sendall(ANSWER)
            except OSError as error:
                print(error, flush=True)


def ask(port, certificate=None):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate:
        context.load_cert_chain(certificate)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    stream = context.wrap_bio(incoming, outgoing)
    connection = socket.create_connection(("127.0.0.1", int(port)))

    def until_done(act):
        while True:
            try:
                return act()
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
                incoming.write(connection.recv(65536))

    until_done(stream.do_handshake)
    stream.write(b"request")
    connection.sendall(outgoing.read())
    try:
        length = 0
        while length < len(ANSWER):
            length += len(until_done(lambda: stream.read(65536)))
        print("answered", flush=True)
        connection.recv(1)
    except OSError as error:
        print(type(error).__name__, flush=True)


{"server": serve, "client": ask}[sys.argv[1]](*sys.argv[2:])
