//! A way for tests to end the agent, or to make it fall silent, at a moment of their choice.
//!
//! It is there with the feature `faults` alone, which only `tests/faults/run` builds.

use std::time::Duration;

use tokio::io::AsyncReadExt;

use crate::stream::Listener;

/// The vsock port that is listened on: the first byte of a connection is what to do.
pub const PORT: u32 = 1099;

/// Waits to be told.
pub async fn obey() {
    let listener = match Listener::vsock(PORT) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "tests cannot reach the agent"),
    };
    loop {
        let Ok(mut told) = listener.accept().await else {
            continue;
        };
        match told.read_u8().await {
            // The kernel panics without its init.
            Ok(b'k') => std::process::abort(),
            // One thread is all there is.
            Ok(b's') => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
            _ => {}
        }
    }
}
