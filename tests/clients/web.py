"""What an nginx passes requests on to, and clients of it: backend PORT, http1 ADDRESS PORT, or http2 ADDRESS PORT.

The backend answers `/app/SECONDS/BYTES` after so long with so much, and `/app/events` with an event every half second. A
client says `port: NUMBER` and does what each line that it reads says, without waiting:

get PATH     asks for a page
post PATH    the same by POST, which no proxy repeats; `all of PATH STATUS` is the answer
ping         sends a PING (HTTP/2)

It says `all of PATH` for each answer that is there as a whole, `some of PATH` once for one of which a part is, `pong`, and the
error by which its connection ends.
"""

import http.server
import re
import socket
import sys
import threading
import time


class Backend(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        if self.path == "/app/events":
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            while True:
                self.wfile.write(b"data: x\n\n")
                time.sleep(0.5)
        _, _, seconds, length = self.path.split("/")
        time.sleep(float(seconds))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(b"x" * int(length))

    do_POST = do_GET

    def log_message(self, *_):
        pass


def backend(port):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Backend)
    print("ready", flush=True)
    server.serve_forever()


class Client:
    def __init__(self, address, port):
        self.stream = socket.create_connection((address, int(port)))
        self.lock = threading.Lock()
        self.begun = set()

    def run(self):
        print("port:", self.stream.getsockname()[1], flush=True)
        threading.Thread(target=self.read, daemon=True).start()
        for line in sys.stdin:
            command, _, rest = line.strip().partition(" ")
            with self.lock:
                getattr(self, command)(rest)

    def read(self):
        try:
            while part := self.stream.recv(65536):
                with self.lock:
                    self.received(part)
            print("the end", flush=True)
        except OSError as error:
            print(type(error).__name__, flush=True)

    def some(self, path):
        if path not in self.begun:
            self.begun.add(path)
            print("some of", path, flush=True)


class Http1(Client):
    def __init__(self, *to):
        super().__init__(*to)
        self.asked, self.buffer = [], b""

    def get(self, path):
        self.asked.append(path)
        self.stream.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())

    def post(self, path):
        self.asked.append(path)
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n"
        self.stream.sendall(head.encode())

    def received(self, part):
        self.buffer += part
        while found := re.search(rb"\r\n\r\n", self.buffer):
            length = re.search(rb"(?i)content-length: (\d+)", self.buffer[: found.end()])
            if not length or len(self.buffer) < found.end() + int(length[1]):
                self.some(self.asked[0])
                return
            status = self.buffer.split()[1].decode()
            self.buffer = self.buffer[found.end() + int(length[1]) :]
            print("all of", self.asked.pop(0), status, flush=True)


class Http2(Client):
    def __init__(self, *to):
        from h2.connection import H2Connection

        super().__init__(*to)
        self.asked, self.connection = {}, H2Connection()
        self.connection.initiate_connection()
        self.flush()

    def flush(self):
        self.stream.sendall(self.connection.data_to_send())

    def get(self, path):
        stream = self.connection.get_next_available_stream_id()
        self.asked[stream] = path
        head = {":method": "GET", ":path": path, ":scheme": "http", ":authority": "test"}
        self.connection.send_headers(stream, list(head.items()), end_stream=True)
        self.flush()

    def ping(self, _):
        self.connection.ping(b"12345678")
        self.flush()

    def received(self, part):
        from h2 import events

        for event in self.connection.receive_data(part):
            if isinstance(event, events.DataReceived):
                length = event.flow_controlled_length
                self.connection.acknowledge_received_data(length, event.stream_id)
                self.some(self.asked[event.stream_id])
            elif isinstance(event, events.StreamEnded):
                print("all of", self.asked[event.stream_id], flush=True)
            elif isinstance(event, events.PingAckReceived):
                print("pong", flush=True)
        self.flush()


if sys.argv[1] == "backend":
    backend(sys.argv[2])
else:
    {"http1": Http1, "http2": Http2}[sys.argv[1]](*sys.argv[2:]).run()
