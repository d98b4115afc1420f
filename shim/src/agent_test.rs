use super::*;

/// A VMM's vsock socket that answers one connection.
async fn vmm(answer: &'static [u8]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut line = vec![0; "CONNECT 1024\n".len()];
        stream.read_exact(&mut line).await.unwrap();
        assert_eq!(line, b"CONNECT 1024\n");
        stream.write_all(answer).await.unwrap();
    });
    (dir, path)
}

#[tokio::test]
async fn bytes_after_the_handshake_belong_to_the_connection() {
    let (_dir, path) = vmm(b"OK 1073741824\nhello").await;
    let mut stream = dial(&path, ports::AGENT).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "hello");
}

#[tokio::test]
async fn refusals_and_nonsense_are_errors() {
    for answer in [&b""[..], b"NO\n", b"OK 1", &[b'x'; 100]] {
        let (_dir, path) = vmm(answer).await;
        let error = dial(&path, ports::AGENT).await.unwrap_err();
        assert!(
            matches!(error, Error::Refused { port: ports::AGENT }),
            "{error}"
        );
    }
}

#[tokio::test]
async fn the_announcement_is_bounded_in_time_and_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = host_socket(dir.path(), ports::READY);
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let late = ready(&listener, Duration::from_millis(20))
        .await
        .unwrap_err();
    assert!(matches!(late, Error::NotReady { .. }));

    let announce = |bytes: Vec<u8>| {
        let path = path.clone();
        tokio::spawn(async move {
            let mut stream = UnixStream::connect(path).await.unwrap();
            // The other side stops reading at the limit.
            let _ = stream.write_all(&bytes).await;
        })
    };
    announce(vec![b' '; 1 << 20]);
    let long = ready(&listener, Duration::from_secs(5)).await.unwrap_err();
    assert!(matches!(long, Error::Announcement(_)), "{long}");
    announce(br#"{"version":"0.1.0","kernel":"6.12","stages":[]}"#.to_vec());
    assert_eq!(
        ready(&listener, Duration::from_secs(5))
            .await
            .unwrap()
            .kernel,
        "6.12"
    );
}

#[test]
fn where_guests_boot_slowly_the_agent_may_be_slow_too() {
    let nanos = |limit: Limit, seconds| limit.context(Duration::from_secs(seconds)).timeout_nano;
    let second = 1_000_000_000;
    assert_eq!(nanos(Limit::Long, 30), 60 * second);
    assert_eq!(nanos(Limit::Long, 300), 300 * second);
    assert_eq!(nanos(Limit::Short, 300), 10 * second);
    assert_eq!(nanos(Limit::None, 30), 0);
}
