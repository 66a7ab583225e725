"""A RabbitMQ, and a client of it with heartbeats: server ADDRESS, or client ADDRESS.

The client publishes a message for each line that it reads, and says `published`. It answers and sends heartbeats meanwhile,
every second or so, and says the error by which its connection ends.
"""

import os
import select
import subprocess
import sys
import tempfile

SETTINGS = """\
[{rabbit, [{tcp_listeners, [{"ADDRESS", 5672}]}, {loopback_users, []}]}].
"""


def serve(address):
    # RabbitMQ is not root here, and keeps everything in one directory.
    with tempfile.TemporaryDirectory() as directory:
        file = os.path.join(directory, "advanced.config")
        with open(file, "w") as settings:
            settings.write(SETTINGS.replace("ADDRESS", address))
        with open(os.path.join(directory, "plugins"), "w") as plugins:
            plugins.write("[].")
        subprocess.run(["chown", "-R", "nobody", directory], check=True)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": directory,
            "HOSTNAME": "localhost",
            "RABBITMQ_NODENAME": "test@localhost",
            "RABBITMQ_MNESIA_BASE": directory,
            "RABBITMQ_LOG_BASE": directory,
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_ADVANCED_CONFIG_FILE": file,
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_ENABLED_PLUGINS_FILE": os.path.join(directory, "plugins"),
            "RABBITMQ_PID_FILE": os.path.join(directory, "pid"),
        }
        command = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        command += ["/usr/lib/rabbitmq/bin/rabbitmq-server"]
        broker = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=directory)
        for line in broker.stdout:
            print(line, end="", flush=True)
            if "Server startup complete" in line:
                print("ready", flush=True)


def ask(address):
    import pika

    connection = pika.BlockingConnection(pika.ConnectionParameters(address, heartbeat=2))
    channel = connection.channel()
    channel.queue_declare("test")
    print("port:", connection._impl._transport._sock.getsockname()[1], flush=True)
    try:
        while True:
            connection.process_data_events(0.2)
            if select.select([sys.stdin], [], [], 0)[0]:
                sys.stdin.readline()
                channel.basic_publish("", "test", b"a message")
                print("published", flush=True)
    except pika.exceptions.AMQPError as error:
        print("error:", type(error).__name__, flush=True)


{"server": serve, "client": ask}[sys.argv[1]](*sys.argv[2:])
