//! Live readers of audit records. The audit never waits for a reader; a reader that falls behind is cut off.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use bytes::Bytes;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The maximum number of readers.
const MAX_READERS: usize = 16;

/// The maximum number of unread bytes of one reader. Readers share the memory of the records, so this also
/// bounds all readers together.
const MAX_UNREAD_BYTES: usize = 4 << 20;

/// The list of readers.
#[derive(Debug, Default)]
pub(super) struct Subscribers(Vec<Subscriber>);

#[derive(Debug)]
struct Subscriber {
    records: UnboundedSender<Bytes>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    waiting_bytes: AtomicUsize,
    is_cut_off: AtomicBool,
}

/// A reader's stream of records.
#[derive(Debug)]
pub struct Subscription {
    records: UnboundedReceiver<Bytes>,
    shared: Arc<Shared>,
}

impl Subscribers {
    /// Adds a reader. `None` if there are too many.
    pub(super) fn add(&mut self) -> Option<Subscription> {
        self.0.retain(|reader| !reader.records.is_closed());
        if self.0.len() >= MAX_READERS {
            return None;
        }
        let (sender, records) = unbounded_channel();
        let shared = Arc::new(Shared::default());
        self.0.push(Subscriber {
            records: sender,
            shared: Arc::clone(&shared),
        });
        Some(Subscription { records, shared })
    }

    /// Sends whole records to all readers.
    pub(super) fn publish(&mut self, records: &[u8]) {
        if self.0.is_empty() {
            return;
        }
        let records = Bytes::copy_from_slice(records);
        self.0.retain(|reader| reader.takes(&records));
    }

    /// Ends all streams.
    pub(super) fn close(&mut self) {
        self.0.clear();
    }
}

impl Subscriber {
    /// Whether the reader stays subscribed: it is connected and has not fallen behind.
    fn takes(&self, records: &Bytes) -> bool {
        let before = self
            .shared
            .waiting_bytes
            .fetch_add(records.len(), Ordering::Relaxed);
        if before + records.len() > MAX_UNREAD_BYTES {
            self.shared.is_cut_off.store(true, Ordering::Relaxed);
            return false;
        }
        self.records.send(records.clone()).is_ok()
    }
}

impl Subscription {
    /// Returns the next records as whole lines, or `None` at the end.
    pub async fn next(&mut self) -> Option<Bytes> {
        let records = self.records.recv().await?;
        self.shared
            .waiting_bytes
            .fetch_sub(records.len(), Ordering::Relaxed);
        Some(records)
    }

    /// Whether the reader fell behind and was cut off. It receives no more records.
    pub fn is_cut_off(&self) -> bool {
        self.shared.is_cut_off.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reader_has_what_is_made_from_then_on() {
        let mut all = Subscribers::default();
        all.publish(b"before\n");
        let (mut one, mut other) = (all.add().unwrap(), all.add().unwrap());
        all.publish(b"a\n");
        all.publish(b"b\n");
        for reader in [&mut one, &mut other] {
            assert_eq!(reader.next().await.unwrap(), "a\n");
            assert_eq!(reader.next().await.unwrap(), "b\n");
        }
        all.close();
        assert!(one.next().await.is_none() && !one.is_cut_off());
    }

    #[tokio::test]
    async fn only_a_subscriber_that_does_not_keep_up_is_cut_off() {
        let mut all = Subscribers::default();
        let (mut slow, mut quick) = (all.add().unwrap(), all.add().unwrap());
        let records = vec![b'x'; MAX_UNREAD_BYTES / 4];
        for _ in 0..8 {
            all.publish(&records);
            quick.next().await.unwrap();
        }
        assert!(slow.is_cut_off() && !quick.is_cut_off());
        let mut rest = 0;
        while let Some(records) = slow.next().await {
            rest += records.len();
        }
        assert_eq!(rest, MAX_UNREAD_BYTES);
    }

    #[test]
    fn readers_are_bounded_and_those_that_have_gone_do_not_count() {
        let mut all = Subscribers::default();
        let mut readers: Vec<_> = (0..MAX_READERS).map(|_| all.add().unwrap()).collect();
        assert!(all.add().is_none());
        readers.pop();
        assert!(all.add().is_some());
    }
}
