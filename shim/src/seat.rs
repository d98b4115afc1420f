//! The place of this process's one pod, which both services look at.

use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result};
use crate::pod::Pod;

/// Empty until a pod is begun; then it holds the pod, or the reason why there is none.
#[derive(Default)]
pub struct Seat(OnceLock<Result<Arc<Pod>, Arc<Error>>>);

impl Seat {
    /// Gives the seat to a pod, or to the reason why there is none. The first who comes has it.
    pub fn take(&self, pod: Result<Arc<Pod>>) {
        let _ = self.0.set(pod.map_err(Arc::new));
    }

    /// The pod.
    ///
    /// # Errors
    /// It has not been begun, or could not be: each call is told why.
    pub fn pod(&self) -> Result<&Arc<Pod>> {
        match self.0.get() {
            Some(Ok(pod)) => Ok(pod),
            Some(Err(e)) => Err(Error::Pod(e.clone())),
            None => Err(Error::NotCreated),
        }
    }
}
