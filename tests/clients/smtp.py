"""A mail server that scans each message for a while, and a client that sends one: server ADDRESS SECONDS, or client ADDRESS.

The client says `taken`, or the error.
"""

import asyncio
import smtplib
import sys


async def serve(address, seconds):
    from aiosmtpd.smtp import SMTP

    class Scanner:
        async def handle_DATA(self, *_):
            await asyncio.sleep(float(seconds))
            return "250 Taken"

    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(Scanner()), address, 25)
    print("ready", flush=True)
    await server.serve_forever()


def ask(address):
    smtp = smtplib.SMTP(address, local_hostname="client.test")
    print("port:", smtp.sock.getsockname()[1], flush=True)
    try:
        smtp.sendmail("a@client.test", ["b@server.test"], "Subject: test\r\n\r\ntext\r\n")
        print("taken", flush=True)
        smtp.sock.recv(1)
    except (OSError, smtplib.SMTPException) as error:
        print(type(error).__name__, flush=True)


if sys.argv[1] == "server":
    asyncio.run(serve(*sys.argv[2:]))
else:
    ask(*sys.argv[2:])
