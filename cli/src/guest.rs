//! The way into a guest: vsock through the VMM's Unix socket, and the agent's service behind it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use sepal_protocol::agent_ttrpc::AgentClient;
use sepal_protocol::ports;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

/// Longest wait for a connection.
const PATIENCE: Duration = Duration::from_secs(10);
/// `OK <port>\n` with the largest port.
const LONGEST_ANSWER: usize = "OK 4294967295\n".len();

/// A pod's guest.
pub struct Guest {
    vsock: PathBuf,
}

impl Guest {
    /// The guest behind this socket.
    pub fn new(vsock: PathBuf) -> Self {
        Self { vsock }
    }

    /// A client of the agent.
    ///
    /// # Errors
    /// The VM is gone, or its agent.
    pub async fn agent(&self) -> anyhow::Result<AgentClient> {
        let stream = dial(&self.vsock, ports::AGENT)
            .await
            .context("cannot reach the agent")?;
        Ok(AgentClient::new(Client::new(Socket::new(stream))))
    }

    /// A stream for a process's standard input or output, and the token that names it.
    ///
    /// # Errors
    /// As for [`Guest::agent`].
    pub async fn stream(&self) -> anyhow::Result<(UnixStream, Vec<u8>)> {
        let mut token = [0_u8; ports::STDIO_TOKEN_LEN];
        let mut random = std::fs::File::open("/dev/urandom").context("cannot make a token")?;
        std::io::Read::read_exact(&mut random, &mut token).context("cannot make a token")?;
        let open = async {
            let mut stream = dial(&self.vsock, ports::STDIO).await?;
            stream.write_all(&token).await?;
            Ok::<_, anyhow::Error>(stream)
        };
        Ok((
            open.await.context("cannot open a standard stream")?,
            token.to_vec(),
        ))
    }
}

/// Connects to a port in the guest (`protocol/src/ports.rs` has the hand-shake).
async fn dial(vsock: &Path, port: u32) -> anyhow::Result<UnixStream> {
    let connect = async {
        let mut stream = UnixStream::connect(vsock)
            .await
            .context("the virtual machine is gone")?;
        stream
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .await?;
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            ensure!(
                answer.len() < LONGEST_ANSWER,
                "the virtual machine's answer is none"
            );
            // What follows the line is the connection's, so no more is read than the line.
            let byte = stream
                .read_u8()
                .await
                .context("nobody listens in the guest")?;
            answer.push(byte);
        }
        ensure!(answer.starts_with(b"OK "), "nobody listens in the guest");
        Ok(stream)
    };
    match tokio::time::timeout(PATIENCE, connect).await {
        Ok(result) => result,
        Err(_) => bail!("no answer within {} s", PATIENCE.as_secs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn against(answer: &'static [u8]) -> anyhow::Result<Vec<u8>> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("vsock.sock");
        let listener = tokio::net::UnixListener::bind(&path)?;
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 13];
            stream.read_exact(&mut request).await.unwrap();
            assert_eq!(&request, b"CONNECT 1026\n");
            stream.write_all(answer).await.unwrap();
        });
        let result = dial(&path, ports::STDIO).await;
        server.await?;
        let mut rest = Vec::new();
        result?.read_to_end(&mut rest).await?;
        Ok(rest)
    }

    #[tokio::test]
    async fn what_follows_the_answer_is_the_connections() {
        assert_eq!(
            against(b"OK 1073741824\nfirst words").await.unwrap(),
            b"first words"
        );
    }

    #[tokio::test]
    async fn refusals_and_nonsense_are_errors() {
        for answer in [b"".as_slice(), b"NO\n", b"OKOKOKOKOKOKOKOKOKOK\n"] {
            assert!(against(answer).await.is_err());
        }
    }
}
