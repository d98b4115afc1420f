//! Standard input, output and error: every byte, in order, to the end; and terminals.

use std::io::{Read, Write};
use std::process::ChildStdin;

use sepal_tests::{Bed, Client, Kind, Terminal, eventually, seconds};
use sha2::{Digest, Sha256};

const MIB: usize = 1 << 20;

/// A stream of bytes that repeats only after 2^64 words (xorshift), so that a block lost, doubled or
/// out of order changes the digest.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, block: &mut [u8]) {
        for word in block.chunks_exact_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes());
        }
    }
}

/// Writes that many bytes of noise.
fn pour(stdin: &mut ChildStdin, bytes: usize) {
    let mut noise = Noise(0x5e9a1);
    let mut block = vec![0; 64 * 1024];
    for _ in 0..bytes / block.len() {
        noise.fill(&mut block);
        stdin.write_all(&block).expect("the container reads");
    }
}

fn digest_of_noise(bytes: usize) -> String {
    let mut noise = Noise(0x5e9a1);
    let mut block = vec![0; 64 * 1024];
    let mut digest = Sha256::new();
    for _ in 0..bytes / block.len() {
        noise.fill(&mut block);
        digest.update(&block);
    }
    format!("{:x}", digest.finalize())
}

/// Bytes read to the end, and their digest.
fn drain(mut stream: impl Read) -> (usize, String) {
    let mut digest = Sha256::new();
    let mut block = vec![0; 64 * 1024];
    let mut total = 0;
    loop {
        match stream.read(&mut block).expect("a pipe") {
            0 => return (total, format!("{:x}", digest.finalize())),
            count => {
                digest.update(&block[..count]);
                total += count;
            }
        }
    }
}

/// Long transfers are for the native bed; emulation gets a sixteenth.
fn long(bed: &Bed, bytes: usize) -> usize {
    if bed.kind() == Kind::Native {
        bytes
    } else {
        bytes / 16
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn much_goes_in_and_comes_out_while_stderr_is_busy_too() {
    let bed = Bed::get();
    let through = long(&bed, 256 * MIB);
    let aside = long(&bed, 64 * MIB);
    let line = format!("head -c {aside} /dev/zero >&2 & cat; wait");
    let mut run = bed
        .ctr_run(&[], &bed.busybox(), ["sh", "-c", &line])
        .feed(move |mut stdin| pour(&mut stdin, through))
        .patience(seconds(300))
        .spawn();
    let (stdout, stderr) = (run.stdout(), run.stderr());
    let errors = std::thread::spawn(move || drain(stderr));
    let (count, digest) = drain(stdout);
    let status = run.wait().expect("it ends in time");
    assert!(status.success(), "{status}");
    assert_eq!((count, digest), (through, digest_of_noise(through)));
    let (count, digest) = errors.join().expect("a reader");
    assert_eq!(count, aside);
    let zeroes = (0..aside / MIB).fold(Sha256::new(), |digest, _| digest.chain_update([0; MIB]));
    assert_eq!(digest, format!("{:x}", zeroes.finalize()));
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn much_goes_into_an_exec_and_comes_out() {
    let bed = Bed::get();
    let through = long(&bed, 32 * MIB);
    let container = bed.ctr_start(&[], &bed.busybox(), &["sleep", "1000"]);
    let said = container
        .exec_command(&[], ["sha256sum"])
        .feed(move |mut stdin| pour(&mut stdin, through))
        .patience(seconds(120))
        .run()
        .success()
        .out();
    assert_eq!(
        said.split(' ').next(),
        Some(digest_of_noise(through).as_str())
    );
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn end_of_input_is_seen_and_what_follows_is_still_written() {
    let bed = Bed::get();
    let argv = ["sh", "-c", "wc -c; sleep 1; echo after the end"];
    let run = bed
        .nerdctl_run(&["-i"], &bed.busybox(), &argv)
        .stdin("twelve bytes")
        .run();
    assert_eq!(run.success().out(), "12\nafter the end");
    // ctr forgets an end of input that comes before the task is there: it gets it late.
    let until_it_is_there = seconds(if bed.kind() == Kind::Native { 4 } else { 60 });
    let late = move |mut stdin: ChildStdin| {
        stdin.write_all(b"twelve bytes").expect("a pipe");
        std::thread::sleep(until_it_is_there);
    };
    let run = bed.ctr_run(&[], &bed.busybox(), argv).feed(late).run();
    assert_eq!(run.success().out(), "12\nafter the end");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_reader_that_leaves_early_does_no_harm() {
    let bed = Bed::get();
    // The container stops reading after ten bytes; we go on writing and are not stuck.
    let run = bed
        .ctr_run(
            &[],
            &bed.busybox(),
            ["sh", "-c", "head -c 10 >/dev/null; exec <&-; echo enough"],
        )
        .feed(|mut stdin| {
            let block = vec![b'x'; 64 * 1024];
            // Its end is told as a broken pipe, at the latest when the container is gone.
            while stdin.write_all(&block).is_ok() {}
        })
        .run();
    assert_eq!(run.success().out(), "enough");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_client_that_stops_reading_does_not_stop_the_end() {
    let bed = Bed::get();
    let container = bed.named(Client::Ctr, "deaf");
    let mut run = bed
        .command([
            "ctr",
            "run",
            "--runtime",
            bed.runtime(),
            &bed.busybox(),
            container.id(),
        ])
        .args(["sh", "-c", "yes"])
        .spawn();
    let mut first = [0; 2];
    run.stdout().read_exact(&mut first).expect("some output");
    assert_eq!(&first, b"y\n");
    // Dropping its end of the pipe ended the client, or will: the container can be killed anyway.
    container.task("kill", &["-s", "KILL"]).success();
    eventually("the task stops", seconds(20), || {
        container
            .status()
            .is_none_or(|status| status == "STOPPED")
            .then_some(())
    });
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_two_outputs_stay_apart() {
    let bed = Bed::get();
    let run = bed
        .busybox_run(["sh", "-c", "echo to stdout; echo to stderr >&2"])
        .success();
    assert_eq!(
        (run.out().as_str(), run.err().as_str()),
        ("to stdout", "to stderr")
    );
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn what_is_written_last_is_not_lost() {
    let bed = Bed::get();
    // containerd's client closes its pipes as soon as it hears of the end.
    for round in 0..10 {
        let line = format!("head -c 300000 /dev/zero | tr '\\0' x; exit {round}");
        let said = bed.busybox_run(["sh", "-c", &line]).exits(round);
        assert_eq!(said.bytes().len(), 300_000, "round {round}");
    }
    let container = bed.ctr_start(&[], &bed.busybox(), &["sleep", "1000"]);
    for round in 0..10 {
        let line = format!("head -c 300000 /dev/zero | tr '\\0' x; exit {round}");
        let said = container.exec(["sh", "-c", &line]).exits(round);
        assert_eq!(said.bytes().len(), 300_000, "round {round}");
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_background_child_that_holds_the_output_does_not_hold_the_exit() {
    let bed = Bed::get();
    let container = bed.ctr_start(&[], &bed.busybox(), &["sleep", "1000"]);
    let said = container
        .exec(["sh", "-c", "sleep 1000 & echo started"])
        .success();
    assert_eq!(said.out(), "started");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_terminal_that_follows_its_window() {
    let bed = Bed::get();
    let container = bed.named(Client::Ctr, "term");
    let command = bed
        .terminal_command(["ctr", "run", "--rm", "--tty", "--runtime", bed.runtime()])
        .args([&bed.busybox(), container.id()])
        .arg("sh");
    let mut terminal = Terminal::start(command, 91, 27);
    terminal.line("tty");
    terminal.expect("/dev/pts/");
    // The client tells the size once the process runs: ask until it has arrived.
    terminal
        .line("until [ \"$(stty size)\" = '27 91' ]; do sleep 0.1; done; echo first: $(stty size)");
    terminal.expect("first: 27 91");
    terminal.resize(123, 45);
    // The window's change travels on its own: ask until it has arrived.
    terminal
        .line("until [ \"$(stty size)\" = '45 123' ]; do sleep 0.1; done; echo now: $(stty size)");
    terminal.expect("now: 45 123");
    // Ctrl-C reaches the foreground process and not the shell. The process speaks itself: between
    // fork and exec it would still ignore the signal, as the shell does.
    terminal.line("sh -c 'echo wait; exec sleep 1000'; echo interrupted: $?");
    terminal.expect("\nwait");
    terminal.keys(b"\x03");
    terminal.line("echo still here");
    terminal.expect("\nstill here");
    terminal.line("exit 7");
    assert_eq!(terminal.wait(), 7);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn detach_and_attach_again() {
    let bed = Bed::get();
    let line = "n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.2; done";
    let container = bed.named(Client::Nerdctl, "detach");
    let run = bed
        .terminal_command(["nerdctl", "run", "-i", "-t", "--runtime", bed.runtime()])
        .args([
            "--network",
            "none",
            "--name",
            container.id(),
            &bed.busybox(),
        ])
        .args(["sh", "-c", line]);
    let mut terminal = Terminal::start(run, 80, 25);
    terminal.expect("tick ");
    // Docker's keys to detach: the container goes on.
    terminal.keys(b"\x10\x11");
    assert_eq!(terminal.wait(), 0);
    assert_eq!(container.status().as_deref(), Some("RUNNING"));

    let attach = bed.terminal_command(["nerdctl", "attach", container.id()]);
    let mut terminal = Terminal::start(attach, 80, 25);
    terminal.expect("tick ");
    terminal.keys(b"\x10\x11");
    assert_eq!(terminal.wait(), 0);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn attach_to_a_task_whose_client_went_away() {
    let bed = Bed::get();
    let line = "while read line; do echo you said $line; done";
    let container = bed.named(Client::Ctr, "attach");
    let start = || {
        bed.terminal_command(["ctr", "run", "--tty", "--runtime", bed.runtime()])
            .args([&bed.busybox(), container.id()])
            .args(["sh", "-c", line])
    };
    let mut terminal = Terminal::start(start(), 80, 25);
    terminal.line("one");
    terminal.expect("you said one");
    terminal.end();

    let attach = bed.terminal_command(["ctr", "task", "attach", container.id()]);
    let mut terminal = Terminal::start(attach, 80, 25);
    terminal.line("two");
    terminal.expect("you said two");
    terminal.end();
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
}
