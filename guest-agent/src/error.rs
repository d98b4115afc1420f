//! What can go wrong in the agent, and the ttrpc code that each error answers with.

use std::io;

use ttrpc::Code;

/// An error of the agent. Its text goes to the user through the shim: one sentence naming the cause.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The named container is not known.
    #[error("container {0} does not exist")]
    NoContainer(String),
    /// The named process of a known container is not known.
    #[error("process {exec:?} of container {container} does not exist")]
    NoProcess {
        /// Container id.
        container: String,
        /// Exec id, empty for init.
        exec: String,
    },
    /// The process has ended before.
    #[error("process already finished")]
    Finished,
    /// A container or an exec of this name is there already.
    #[error("{0} already exists")]
    Exists(String),
    /// The call does not fit the state that the container or process is in.
    #[error("{0}")]
    State(String),
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The guest or its image cannot do this.
    #[error("{0}")]
    Unsupported(String),
    /// A container or process could not be brought to life.
    #[error("{0}")]
    Launch(String),
    /// It took too long.
    #[error("{0}")]
    Timeout(String),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// rtnetlink refused.
    #[error("{what}: {source}")]
    Network {
        /// What was attempted.
        what: String,
        /// Why it failed.
        source: Box<rtnetlink::Error>,
    },
}

/// A result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The ttrpc status code of this error.
    fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::Finished => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::State(_) => Code::FAILED_PRECONDITION,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Timeout(_) => Code::DEADLINE_EXCEEDED,
            Self::Launch(_) => Code::UNKNOWN,
            Self::Io { .. } | Self::Network { .. } => Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}

/// Adds to an I/O error what was attempted.
pub trait Context<T> {
    /// Wraps the error into [`Error::Io`].
    ///
    /// # Errors
    /// The wrapped error.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io {
            what: what(),
            source: source.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_reach_the_wire() {
        let ttrpc::Error::RpcStatus(status) = Error::NoContainer("a".into()).into() else {
            panic!("not a status");
        };
        assert_eq!(status.code(), Code::NOT_FOUND);
        assert_eq!(status.message(), "container a does not exist");
    }
}
