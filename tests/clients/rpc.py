"""A gRPC server, and a client with keepalives: server ADDRESS, or client ADDRESS.

The client calls a method that takes so many seconds as each line that it reads says, and says `answered` or the status. Its
channel sends a PING every second, calls or not.
"""

import concurrent.futures
import sys
import time

import grpc

PORT = 50051
OFTEN = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 20000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.bdp_probe", 0),
]
ALLOWED = [
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.bdp_probe", 0),
]


def take(request, _):
    time.sleep(float(request))
    return b"x" * 2000


class Service(grpc.GenericRpcHandler):
    def service(self, call):
        return grpc.unary_unary_rpc_method_handler(take)


def serve(address):
    pool = concurrent.futures.ThreadPoolExecutor()
    server = grpc.server(pool, handlers=[Service()], options=ALLOWED)
    server.add_insecure_port(f"{address}:{PORT}")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


def ask(address):
    channel = grpc.insecure_channel(f"{address}:{PORT}", options=OFTEN)
    call = channel.unary_unary("/test.Service/Take")
    call(b"0")
    # The library does not say which port it has: it has one connection.
    print("port:", own_port(address), flush=True)
    for line in sys.stdin:
        try:
            call(line.strip().encode())
            print("answered", flush=True)
        except grpc.RpcError as error:
            print(error.code().name, flush=True)


def own_port(address):
    """As proc(5) has it: addresses in the order of the processor's bytes, ports in digits."""
    digits = bytes(map(int, address.split(".")))[::-1].hex().upper()
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{table}"):
            fields = line.split()
            if fields[2].endswith(f"{digits}:{PORT:04X}") and fields[3] == "01":
                return int(fields[1].split(":")[1], 16)


{"server": serve, "client": ask}[sys.argv[1]](*sys.argv[2:])
