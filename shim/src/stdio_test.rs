use std::io::{Read, Write};

use super::*;

fn fifo(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    path.to_str().unwrap().into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_survives_a_reader_that_goes_and_another_that_comes() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "out");
    let sink = open_sink(&path).unwrap().unwrap();
    let (mut guest, host) = UnixStream::pair().unwrap();
    let progress = Arc::new(Progress::default());
    let counter = progress.clone();
    let copy = tokio::spawn(async move { copy_out(host, sink, &counter).await });
    let read = |length: usize, path: String| {
        tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; length];
            std::fs::File::open(path)
                .unwrap()
                .read_exact(&mut bytes)
                .unwrap();
            bytes
        })
    };
    let data: Vec<u8> = (0..1_000_000_u32).map(|i| (i % 251) as u8).collect();
    let sent = data.clone();
    let writer = tokio::spawn(async move { guest.write_all(&sent).await.unwrap() });
    let mut got = read(300_000, path.clone()).await.unwrap();
    got.extend(read(700_000, path).await.unwrap());
    writer.await.unwrap();
    copy.await.unwrap();
    assert!(got == data, "nothing is lost between two readers");
    assert_eq!(progress.written.load(Ordering::Relaxed), 1_000_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn input_ends_after_close_io_and_not_when_a_client_goes() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "in");
    let (host, mut guest) = UnixStream::pair().unwrap();
    let streams = Streams::default();
    lock(&streams.input).waiting = Some((path.clone(), host));
    streams.feed();
    let write = |text: &'static str| {
        let path = path.clone();
        tokio::task::spawn_blocking(move || {
            let mut file = std::fs::File::options().write(true).open(path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        })
    };
    write("one ").await.unwrap();
    write("two").await.unwrap();
    let mut text = [0; 7];
    guest.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"one two");
    let more = tokio::time::timeout(Duration::from_millis(50), guest.read(&mut text)).await;
    assert!(more.is_err(), "no end of file while the shim keeps it open");
    streams.close_stdin();
    assert_eq!(guest.read(&mut text).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn close_io_before_the_fifo_is_open_is_not_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "in");
    let (host, mut guest) = UnixStream::pair().unwrap();
    let streams = Streams::default();
    lock(&streams.input).waiting = Some((path.clone(), host));
    streams.close_stdin();
    let client = tokio::task::spawn_blocking(move || std::fs::write(path, "all"));
    // The client's open waits for ours.
    tokio::time::sleep(Duration::from_millis(20)).await;
    streams.feed();
    client.await.unwrap().unwrap();
    let mut text = String::new();
    guest.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "all");
}

#[tokio::test]
async fn the_input_of_a_process_whose_client_has_gone_with_its_fifo_ends() {
    let (host, mut guest) = UnixStream::pair().unwrap();
    let streams = Streams::default();
    lock(&streams.input).waiting = Some(("/nonexistent/in".into(), host));
    streams.feed();
    assert_eq!(guest.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_full_fifo_without_a_reader_does_not_hold_up_the_exit() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "out");
    let (mut guest, host) = UnixStream::pair().unwrap();
    let streams = copying(&path, host);
    let flood = tokio::spawn(async move { guest.write_all(&[0; 1 << 20]).await });
    tokio::time::timeout(Duration::from_secs(5), streams.finish(Some([1 << 20, 0])))
        .await
        .unwrap();
    assert!(streams.progress[0].written.load(Ordering::Relaxed) >= 4096);
    streams.close().await;
    flood.abort();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_owes_bytes_and_sends_them_one_by_one_does_not_hold_up_the_exit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    std::fs::write(&path, "").unwrap();
    let (mut guest, host) = UnixStream::pair().unwrap();
    let streams = copying(path.to_str().unwrap(), host);
    let dribble = tokio::spawn(async move {
        loop {
            tokio::time::sleep(OWED - Duration::from_secs(1)).await;
            guest.write_all(b"x").await.unwrap();
        }
    });
    let begun = Instant::now();
    streams.finish(Some([u64::MAX, 0])).await;
    let took = begun.elapsed();
    assert!(took < OWED_IN_ALL + OWED, "{took:?}");
    assert!(streams.progress[0].written.load(Ordering::Relaxed) >= 1);
    streams.close().await;
    dribble.abort();
}

/// Streams whose standard output is the FIFO.
fn copying(path: &str, host: UnixStream) -> Streams {
    let streams = Streams::default();
    let sink = open_sink(path).unwrap().unwrap();
    streams.copy_to(sink, host, &streams.progress[0]);
    streams
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_waits_for_a_client_that_reads_slowly() {
    const BYTES: usize = 200_000;
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "out");
    let (mut guest, host) = UnixStream::pair().unwrap();
    let streams = copying(&path, host);
    let told = Arc::new(AtomicBool::new(false));
    let end = told.clone();
    let client = tokio::task::spawn_blocking(move || {
        let mut file = std::fs::File::open(path).unwrap();
        let mut block = [0; 20_000];
        for _ in 0..BYTES / block.len() {
            std::thread::sleep(Duration::from_millis(10));
            assert!(!end.load(Ordering::SeqCst), "told before all was read");
            file.read_exact(&mut block).unwrap();
        }
        assert_eq!(file.read(&mut block).unwrap(), 0);
    });
    guest.write_all(&vec![1; BYTES]).await.unwrap();
    drop(guest);
    streams.finish(Some([BYTES as u64, 0])).await;
    told.store(true, Ordering::SeqCst);
    client.await.unwrap();
}

#[tokio::test]
async fn the_end_waits_for_bytes_that_the_guest_has_sent_and_the_host_has_not_seen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::fs::write(&path, "").unwrap();
    let (mut guest, host) = UnixStream::pair().unwrap();
    let streams = copying(path.to_str().unwrap(), host);
    let late = tokio::spawn(async move {
        tokio::time::sleep(STUCK + Duration::from_millis(200)).await;
        guest.write_all(b"late").await.unwrap();
    });
    streams.finish(Some([4, 0])).await;
    late.await.unwrap();
    streams.close().await;
    assert_eq!(std::fs::read_to_string(path).unwrap(), "late");
}

#[tokio::test]
async fn an_output_that_another_process_holds_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path(), "out");
    let (mut guest, host) = UnixStream::pair().unwrap();
    let streams = copying(&path, host);
    let client = tokio::task::spawn_blocking(move || {
        let mut text = [0; 7];
        let mut file = std::fs::File::open(path).unwrap();
        file.read_exact(&mut text).unwrap();
        (file, text)
    });
    guest.write_all(b"started").await.unwrap();
    let ended = streams.finish(Some([7, 0]));
    tokio::time::timeout(STUCK / 2, ended).await.unwrap();
    let (_file, text) = client.await.unwrap();
    assert_eq!(&text, b"started");
}

#[tokio::test]
async fn files_are_appended_to_and_other_schemes_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/log");
    let uri = format!("file://{}", path.display());
    for _ in 0..2 {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let sink = open_sink(&uri).unwrap().unwrap();
        guest.write_all(b"line\n").await.unwrap();
        drop(guest);
        copy_out(host, sink, &Progress::default()).await;
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), "line\nline\n");
    assert!(matches!(
        open_sink("vsock://3:1"),
        Err(Error::Scheme { .. })
    ));
    assert!(open_sink("").unwrap().is_none());
    assert!(matches!(
        open_sink("/nonexistent/fifo"),
        Err(Error::Open { .. })
    ));
}

#[tokio::test]
async fn a_log_program_gets_the_output_and_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("logger");
    let log = dir.path().join("log");
    let script = format!(
        "#!/bin/sh\nexec 5>&-\n{{ echo $CONTAINER_NAMESPACE $CONTAINER_ID $1; cat <&3; cat <&4; }} > {}\n",
        log.display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(
        &program,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let wanted = Wanted {
        stdout: format!("binary://{}?key=", program.display()),
        stderr: String::new(),
        ..Wanted::default()
    };
    let opened = open_host(&wanted, "ns", "c1").await.unwrap();
    let (mut guest, host) = UnixStream::pair().unwrap();
    guest.write_all(b"hello\n").await.unwrap();
    drop((guest, opened.stderr));
    copy_out(host, opened.stdout.unwrap(), &Progress::default()).await;
    opened.logger.unwrap().end().await;
    assert_eq!(std::fs::read_to_string(log).unwrap(), "ns c1 key\nhello\n");
}
