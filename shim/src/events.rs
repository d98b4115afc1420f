//! Events to containerd: in order, each once, and also after containerd was away for a while.

use std::collections::VecDeque;
use std::time::Duration;

use containerd_shim::event::Event;
use containerd_shim::util::convert_to_any;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc;
use tokio::sync::{mpsc, oneshot};

/// Most events kept while containerd is away; then the oldest go, those first that the guest alone tells.
const MAX_KEPT: usize = 4096;
/// Topic of what comes when the guest says so, as often as it says so.
const OOM: &str = "/tasks/oom";
/// Longest wait for containerd to take one event.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest pause between two attempts.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Where events go in.
#[derive(Clone)]
pub struct Events {
    namespace: String,
    queue: mpsc::UnboundedSender<Item>,
}

enum Item {
    Event(Box<Envelope>),
    /// Answered when all before it is done with.
    Mark(oneshot::Sender<()>),
}

impl Item {
    fn is_oom(&self) -> bool {
        matches!(self, Self::Event(event) if event.topic() == OOM)
    }
}

impl Events {
    /// Starts the task that forwards to containerd's ttrpc socket.
    pub fn start(namespace: &str, address: String) -> Self {
        let (queue, receiver) = mpsc::unbounded_channel();
        tokio::spawn(forward(address, receiver));
        Self {
            namespace: namespace.into(),
            queue,
        }
    }

    /// Queues an event: events leave in the order of these calls, whichever task makes them.
    pub fn publish(&self, event: impl Event) {
        let mut envelope = Envelope::new();
        envelope.set_topic(event.topic());
        envelope.set_namespace(self.namespace.clone());
        if let Ok(now) = containerd_shim::util::timestamp() {
            envelope.set_timestamp(now);
        }
        tracing::debug!(topic = envelope.topic(), "event");
        match convert_to_any(Box::new(event)) {
            Ok(any) => envelope.set_event(any),
            Err(e) => {
                tracing::error!("cannot encode an event: {e}");
                return;
            }
        }
        // The receiver lives as long as the process.
        let _ = self.queue.send(Item::Event(Box::new(envelope)));
    }

    /// Waits until all that was published has been taken, but not for long.
    pub async fn drain(&self, limit: Duration) {
        let (mark, reached) = oneshot::channel();
        if self.queue.send(Item::Mark(mark)).is_err()
            || !matches!(tokio::time::timeout(limit, reached).await, Ok(Ok(())))
        {
            tracing::warn!("containerd did not take the last events");
        }
    }
}

async fn forward(address: String, mut receiver: mpsc::UnboundedReceiver<Item>) {
    const SHORT: Duration = Duration::from_millis(20);
    let mut kept = VecDeque::new();
    let mut client = None;
    let mut pause = SHORT;
    loop {
        if kept.is_empty() {
            match receiver.recv().await {
                Some(item) => kept.push_back(item),
                None => return,
            }
        }
        while let Ok(item) = receiver.try_recv() {
            keep(&mut kept, item);
        }
        let done = match kept.front() {
            Some(Item::Event(event)) => forward_one(&address, &mut client, event).await,
            Some(Item::Mark(_)) | None => true,
        };
        if done {
            if let Some(Item::Mark(mark)) = kept.pop_front() {
                // Nobody may be waiting any more.
                let _ = mark.send(());
            }
            pause = SHORT;
            continue;
        }
        client = None;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Keeps it, and of too many not all.
fn keep(kept: &mut VecDeque<Item>, item: Item) {
    if kept.len() == MAX_KEPT {
        let least = kept.iter().position(Item::is_oom).unwrap_or(0);
        kept.remove(least);
    }
    kept.push_back(item);
}

/// Whether the event is done with: taken, or refused for good.
async fn forward_one(address: &str, client: &mut Option<EventsClient>, event: &Envelope) -> bool {
    let connected = match client {
        Some(client) => client,
        None => match Client::connect(&format!("unix://{}", address.trim_start_matches("unix://")))
            .await
        {
            Ok(connection) => client.insert(EventsClient::new(connection)),
            Err(e) => {
                tracing::debug!("containerd is away: {e}");
                return false;
            }
        },
    };
    let mut request = ForwardRequest::new();
    request.set_envelope(event.clone());
    let timeout = i64::try_from(TIMEOUT.as_nanos()).unwrap_or(i64::MAX);
    match connected
        .forward(ttrpc::context::with_timeout(timeout), &request)
        .await
    {
        Ok(_) => true,
        Err(ttrpc::Error::RpcStatus(status)) => {
            tracing::warn!(topic = event.topic(), "event refused: {}", status.message());
            // Time-outs are told as a status as well: those are tried again.
            status.code() != ttrpc::Code::DEADLINE_EXCEEDED
                && status.code() != ttrpc::Code::UNAVAILABLE
        }
        Err(e) => {
            tracing::debug!(topic = event.topic(), "event not taken: {e}");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_tells_does_not_push_out_the_ends_of_processes() {
        let event = |topic: &str| {
            let mut envelope = Envelope::new();
            envelope.set_topic(topic.into());
            Item::Event(Box::new(envelope))
        };
        let mut kept = VecDeque::new();
        keep(&mut kept, event("/tasks/exit"));
        for _ in 0..2 * MAX_KEPT {
            keep(&mut kept, event(OOM));
        }
        assert_eq!(kept.len(), MAX_KEPT);
        assert!(!kept[0].is_oom() && kept.range(1..).all(Item::is_oom));
        for _ in 0..2 * MAX_KEPT {
            keep(&mut kept, event("/tasks/exit"));
        }
        assert!(kept.len() == MAX_KEPT && !kept.iter().any(Item::is_oom));
    }
}
