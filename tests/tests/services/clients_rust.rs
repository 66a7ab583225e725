//! Rust clients after a reset of their idle connection. `docs/clients.md` has these results.

use std::{thread, time::Duration};

use anyhow::{Result, anyhow};
use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod};
use redis::{AsyncCommands as _, aio::ConnectionManager};
use session_enforcer_tests::{
    Daemon, enter, patience,
    services::{Postgres, Redis},
    unhurried,
};
use tokio::{
    runtime,
    time::{sleep, timeout},
};
use tokio_postgres::NoTls;

const AGENT: &str = env!("CARGO_BIN_EXE_session-enforcer-test-agent");

/// Longer than three clients take to connect.
fn limit() -> Duration {
    unhurried(Duration::from_secs(4))
}

fn rule(port: u16) -> String {
    let limit = limit().as_secs();
    format!("[[rule]]\nname = \"pools\"\nlocal_ports = [{port}]\nidle_timeout = \"{limit}s\"\n")
}

fn runtime() -> Result<runtime::Runtime> {
    Ok(runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

/// Waits for `count` terminations while the clients' event loop runs, as in an application.
async fn have_ended(daemon: &Daemon, count: usize) -> Result<()> {
    let ended = async {
        // Uses the audit, because the metrics cannot be reached from inside a namespace.
        while daemon.terminations()?.len() < count {
            sleep(Duration::from_millis(50)).await;
        }
        // Gives the clients time to read the reset.
        sleep(Duration::from_millis(500)).await;
        Ok(())
    };
    timeout(patience(), ended).await?
}

async fn ask(pool: &Pool) -> Result<()> {
    let client = pool.get().await?;
    client.query_one("SELECT 1", &[]).await?;
    Ok(())
}

#[test]
fn a_deadpool_pool_reconnects_without_an_error_if_its_event_loop_runs() -> Result<()> {
    let database = Postgres::start(AGENT)?;
    let daemon = database.lab.daemon(&rule(database.port()))?;
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(database.port());
    config.user("postgres").dbname("postgres");
    let pool = |recycling_method| {
        let manager = ManagerConfig { recycling_method };
        let manager = Manager::from_config(config.clone(), NoTls, manager);
        Pool::builder(manager).max_size(1).build()
    };
    let pools = [RecyclingMethod::Fast, RecyclingMethod::Verified].map(pool);
    let [fast, verified] = pools;
    let (fast, verified) = (fast?, verified?);
    runtime()?.block_on(async {
        let (client, connection) = config.connect(NoTls).await?;
        let bare = tokio::spawn(connection);
        ask(&fast).await?;
        ask(&verified).await?;
        client.query_one("SELECT 1", &[]).await?;
        have_ended(&daemon, 3).await?;

        ask(&fast).await?;
        ask(&verified).await?;
        let error = bare.await?.expect_err("the connection has ended");
        assert!(
            format!("{error:?}").contains("ConnectionReset"),
            "{error:?}"
        );
        assert!(client.is_closed());
        assert!(client.query_one("SELECT 1", &[]).await.is_err());
        anyhow::Ok(())
    })
}

/// Whether two uses of a pool succeed if its event loop had no time to read the reset.
fn after_a_blocked_event_loop(method: RecyclingMethod) -> Result<[bool; 2]> {
    let database = Postgres::start(AGENT)?;
    let daemon = database.lab.daemon(&rule(database.port()))?;
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(database.port());
    config.user("postgres").dbname("postgres");
    let manager = ManagerConfig {
        recycling_method: method,
    };
    let manager = Manager::from_config(config, NoTls, manager);
    let pool = Pool::builder(manager).max_size(1).build()?;
    runtime()?.block_on(async {
        ask(&pool).await?;
        // Blocks the event loop while it waits.
        daemon.wait_for_metric("session_enforcer_sessions", &[], 0.0)?;
        let first = ask(&pool).await.is_ok();
        Ok([first, ask(&pool).await.is_ok()])
    })
}

#[test]
fn a_deadpool_pool_fails_once_after_a_blocked_event_loop_unless_it_verifies() -> Result<()> {
    assert_eq!(
        after_a_blocked_event_loop(RecyclingMethod::Fast)?,
        [false, true]
    );
    assert_eq!(
        after_a_blocked_event_loop(RecyclingMethod::Verified)?,
        [true, true]
    );
    Ok(())
}

#[test]
fn a_redis_connection_manager_fails_once_and_a_plain_connection_for_ever() -> Result<()> {
    let redis = Redis::start(AGENT)?;
    let daemon = redis.lab.daemon(&rule(Redis::PORT))?;
    let client = redis::Client::open((Redis::ADDRESS.to_string(), Redis::PORT))?;
    let uses = || -> Result<_> {
        enter(&redis.near_place())?;
        runtime()?.block_on(async {
            let mut manager = ConnectionManager::new(client.clone()).await?;
            let mut plain = client.get_multiplexed_async_connection().await?;
            let _: () = manager.set("key", 1).await?;
            let _: i64 = plain.get("key").await?;
            have_ended(&daemon, 2).await?;
            let mut managed = Vec::new();
            let mut unmanaged = Vec::new();
            for _ in 0..2 {
                let value: redis::RedisResult<i64> = manager.get("key").await;
                managed.push(value.is_ok());
                let value: redis::RedisResult<i64> = plain.get("key").await;
                unmanaged.push(value.is_ok());
                sleep(Duration::from_millis(500)).await;
            }
            anyhow::Ok((managed, unmanaged))
        })
    };
    // setns(2) changes the namespace of this thread only.
    let (managed, unmanaged) =
        thread::scope(|scope| scope.spawn(uses).join()).map_err(|panic| anyhow!("{panic:?}"))??;
    assert_eq!(
        (managed, unmanaged),
        (vec![false, true], vec![false, false])
    );
    Ok(())
}
