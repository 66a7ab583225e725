// A client of Node's, for tests/tests/services/clients_node.rs: NAME HOST PORT.
//
// It connects and says `ready`; then, for each line that it reads, it does something again and says `ok` or the error. What
// happens in between it says too.

const [name, host, port] = process.argv.slice(1);
const say = (what) => console.log(what);
const code = (error) => error.code || error.name;

const postgres = (options, prepare = () => {}) => {
    const pool = new (require("pg").Pool)({ host, port, user: "postgres", database: "postgres", ...options });
    prepare(pool);
    return () => pool.query("SELECT 1");
};

const mysql = { host, port, user: "root" };

const redis = (prepare = () => {}) => {
    const client = new (require("ioredis").Redis)({ host, port });
    prepare(client);
    return client;
};

const clients = {
    "pg": () => postgres({}),
    "pg, error": () => postgres({}, (pool) => pool.on("error", (error) => say(`idle: ${code(error)}`))),
    "pg, short": () => postgres({ idleTimeoutMillis: 1000 }),
    "mysql2": async () => {
        const connection = await require("mysql2/promise").createConnection(mysql);
        connection.on("error", (error) => say(`idle: ${code(error)}`));
        return () => connection.query("SELECT 1");
    },
    "mysql2, pool": () => {
        const pool = require("mysql2/promise").createPool(mysql);
        return () => pool.query("SELECT 1");
    },
    "ioredis": () => {
        const client = redis();
        return () => client.ping();
    },
    "ioredis, blocking": () => {
        const client = redis((client) => client.on("error", () => {}));
        let first = true;
        return async () => {
            if (first) {
                first = false;
                client.blpop("list", 0).then(([, element]) => say(`got ${element}`), (error) => say(code(error)));
            }
        };
    },
};

(async () => {
    const use = await clients[name]();
    await use();
    say("ready");
    for await (const _ of require("readline").createInterface({ input: process.stdin })) {
        await use().then(() => say("ok"), (error) => say(`error: ${code(error)}`));
    }
})();
