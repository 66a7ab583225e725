"""A subscriber of Redis: ADDRESS SECONDS, the time between its pings, or 0 for none.

It says `subscribed`, each message, the error by which its connection ends, and `subscribed again` a moment after that.
"""

import sys
import time

import redis

client = redis.Redis(sys.argv[1], health_check_interval=int(sys.argv[2]))
again = ""
while True:
    subscription = client.pubsub()
    try:
        subscription.subscribe("news")
        while True:
            message = subscription.get_message(timeout=0.2)
            if message and message["type"] == "subscribe":
                print(f"subscribed{again}", flush=True)
            elif message and message["type"] == "message":
                print(message["data"].decode(), flush=True)
    except redis.ConnectionError as error:
        print(type(error).__name__, flush=True)
        again = " again"
        time.sleep(2)
