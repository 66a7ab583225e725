//! What the servers of the metrics and of the control socket ask the engine.

use std::time::Duration;

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::control;

/// If the engine does not answer within this time, it counts as stuck.
pub(super) const ENGINE_TIMEOUT: Duration = Duration::from_secs(5);

/// A request of a server to the engine.
#[derive(Debug)]
pub enum Request {
    /// The metrics in Prometheus' text format.
    Metrics(Scrape),
    /// Whether the daemon is ready, or the reasons why it is not.
    Ready(oneshot::Sender<Result<(), String>>),
    /// Whether the engine is alive.
    Live(oneshot::Sender<()>),
    /// A request of the control socket.
    Control(control::Request),
}

/// The channel for the metrics.
pub type Scrape = oneshot::Sender<Result<String, String>>;

/// Sends a request to the engine. `None` if it does not answer.
pub(super) async fn ask<T>(
    requests: &mpsc::Sender<Request>,
    request: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Option<T> {
    let exchange = async {
        let (reply, answer) = oneshot::channel();
        requests.send(request(reply)).await.ok()?;
        answer.await.ok()
    };
    timeout(ENGINE_TIMEOUT, exchange).await.ok().flatten()
}
