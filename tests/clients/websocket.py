"""A WebSocket server, and a client that pings every second: server ADDRESS, or client ADDRESS.

The client sends each line that it reads as a message, and says what came back, or `closed`.
"""

import asyncio
import sys

import websockets

PORT = 8000


async def echo(connection, *_):
    try:
        async for message in connection:
            await connection.send(message)
    except websockets.ConnectionClosed:
        pass


async def serve(address):
    async with websockets.serve(echo, address, PORT, ping_interval=None):
        print("ready", flush=True)
        await asyncio.Future()


async def ask(address):
    async with websockets.connect(f"ws://{address}:{PORT}", ping_interval=1) as connection:
        print("port:", connection.local_address[1], flush=True)

        async def send():
            while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
                await connection.send(line)

        sending = asyncio.create_task(send())
        try:
            async for message in connection:
                print(message, flush=True)
        except websockets.ConnectionClosed:
            pass
        print("closed", flush=True)
        sending.cancel()


asyncio.run({"server": serve, "client": ask}[sys.argv[1]](sys.argv[2]))
