//! STUB
use tokio::sync::{mpsc, oneshot};
#[allow(missing_docs)]
pub enum Request {
    Metrics(oneshot::Sender<Result<String, String>>),
    Ready(oneshot::Sender<Result<(), String>>),
    Live(oneshot::Sender<()>),
}
#[allow(missing_docs)]
pub fn bind(a: std::net::SocketAddr) -> anyhow::Result<std::net::TcpListener> {
    let l = std::net::TcpListener::bind(a)?;
    l.set_nonblocking(true)?;
    Ok(l)
}
#[allow(missing_docs)]
pub async fn serve(_l: tokio::net::TcpListener, _r: mpsc::Sender<Request>) {
    std::future::pending().await
}
