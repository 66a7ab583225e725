"""A client with a pool of connections, for tests/tests/services/clients.rs: NAME.

It uses its pool and says `ready`; then, for each line that it reads, it uses it
again and says `ok` or the error.
"""

import asyncio
import logging
import sys


def psycopg_pool(**options):
    from psycopg_pool import ConnectionPool

    pool = ConnectionPool("", max_size=2, **{"min_size": 2, **options})
    # As many as it can have.
    with pool.connection() as one, pool.connection() as other:
        one.execute("SELECT 1")
        other.execute("SELECT 1")

    def use():
        with pool.connection() as connection:
            connection.execute("SELECT 1")

    return use


def sqlalchemy(**options):
    from sqlalchemy import create_engine, text

    engine = create_engine("postgresql+psycopg2://", **options)

    def use():
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    return use


def redis():
    from redis import Redis

    return Redis(host=sys.argv[2]).ping


def run(use):
    use()
    print("ready", flush=True)
    for _ in sys.stdin:
        try:
            use()
            print("ok", flush=True)
        except Exception as error:
            print("error:", type(error).__name__, flush=True)


async def asyncpg():
    from asyncpg import create_pool

    pool = await create_pool(min_size=1, max_size=1)
    await pool.fetchval("SELECT 1")
    print("ready", flush=True)
    # The loop runs while the pool is idle, as that of an application does.
    while await asyncio.to_thread(sys.stdin.readline):
        await pool.fetchval("SELECT 1")
        print("ok", flush=True)


CLIENTS = {
    "psycopg_pool": psycopg_pool,
    "psycopg_pool, short": lambda: psycopg_pool(min_size=0, max_idle=1),
    "sqlalchemy": sqlalchemy,
    "sqlalchemy, pre_ping": lambda: sqlalchemy(pool_pre_ping=True),
    "sqlalchemy, recycle": lambda: sqlalchemy(pool_recycle=1),
    "redis": redis,
}

logging.disable()
if sys.argv[1] == "asyncpg":
    asyncio.run(asyncpg())
else:
    run(CLIENTS[sys.argv[1]]())
