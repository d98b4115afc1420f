//! Real programs doing their real work.

use sepal_tests::{Bed, Client, Container, Kind, PodProcess, eventually, seconds};

/// A figure for the native bed, smaller where the machine is emulated.
fn scaled(bed: &Bed, native: u32, node: u32) -> u32 {
    if bed.kind() == Kind::Native {
        native
    } else {
        node
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn nginx_serves_ten_thousand_requests() {
    let bed = Bed::get();
    let count = scaled(&bed, 10_000, 500);
    let web = bed.nerdctl_start(&["--network", "bridge"], &bed.image("nginx"), &[]);
    let address = web.address();
    let page = format!("http://{address}/");
    eventually("nginx answers", seconds(30), || {
        bed.command(["curl", "-sS", "--max-time", "5", &page])
            .run()
            .ok()
            .then_some(())
    });
    // One curl, eight connections, every answer's status on a line.
    let urls = format!("http://{address}/?[1-{count}]");
    let curl = [
        "curl",
        "-sS",
        "--parallel",
        "--parallel-max",
        "8",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code} %{size_download}\\n",
        &urls,
    ];
    let said = bed
        .command(curl)
        .patience(seconds(300))
        .run()
        .success()
        .out();
    let good = said.lines().filter(|line| *line == "200 17").count();
    assert_eq!(good, count as usize, "answers that are not the page");
    // And each on a connection of its own.
    let each =
        "for n in $(seq \"$2\"); do curl -sS --max-time 10 -o /dev/null \"$1\" || exit 1; done";
    let fresh = scaled(&bed, 100, 20).to_string();
    bed.command(["sh", "-c", each, "each", &page, &fresh])
        .patience(seconds(120))
        .run()
        .success();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn redis_benchmark_runs_through() {
    let bed = Bed::get();
    let image = bed.image("redis");
    let server = bed.nerdctl_start(&["--network", "bridge", "--memory", "400m"], &image, &[]);
    let address = server.address();
    eventually("redis answers", seconds(30), || {
        (server.exec(["redis-cli", "ping"]).out() == "PONG").then_some(())
    });
    let requests = scaled(&bed, 10_000, 500).to_string();
    // From another container, over the network of both.
    let argv = [
        "redis-benchmark",
        "-h",
        &address,
        "-n",
        &requests,
        "-c",
        "20",
        "-P",
        "4",
        "--csv",
        "-t",
        "ping,set,get,incr,lpush,lrange_100,mset",
    ];
    let run = bed
        .nerdctl_run(&["--network", "bridge"], &image, &argv)
        .patience(seconds(300))
        .run();
    let said = run.success().out();
    for name in ["SET", "GET", "INCR", "LPUSH", "MSET"] {
        assert!(said.contains(&format!("\"{name}")), "no {name} in {said}");
    }
    let count = server.exec(["redis-cli", "dbsize"]).success().out();
    assert!(
        count.parse::<u32>().is_ok_and(|count| count > 0),
        "{count} keys"
    );
}

/// The database server of the test, on the volume `data`.
fn postgres<'bed>(bed: &'bed Bed, data: &str) -> Container<'bed> {
    let volume = format!("{data}:/var/lib/postgresql/data");
    let line = "[ -e \"$PGDATA/PG_VERSION\" ] || initdb -A trust >/tmp/initdb.log || exit 1; exec postgres -k /tmp";
    let options = [
        "-v",
        &volume,
        "--memory",
        "512m",
        "--shm-size",
        "128m",
        "-e",
        "PGHOST=/tmp",
    ];
    let server = bed.nerdctl_start(&options, &bed.image("postgresql"), &["sh", "-c", line]);
    // One exec that waits, and looks seldom: under emulation each program that starts takes a second.
    server
        .exec_command(
            &[],
            [
                "sh",
                "-c",
                "until [ -S /tmp/.s.PGSQL.5432 ] && pg_isready -q; do sleep 1; done",
            ],
        )
        .run()
        .success();
    server
}

fn sql(server: &Container, statement: &str) -> String {
    server
        .exec(["psql", "-At", "-c", statement, "postgres"])
        .success()
        .out()
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn postgresql_keeps_its_promises_when_the_machine_is_killed() {
    let bed = Bed::get();
    let scratch = bed.scratch();
    // The image's postgres user has to own the volume.
    let who = bed
        .nerdctl_run(&[], &bed.image("postgresql"), &["id", "-u"])
        .run()
        .success()
        .out();
    bed.command(["mkdir", &scratch.file("data")])
        .run()
        .success();
    bed.command(["chown", &who, &scratch.file("data")])
        .run()
        .success();

    let server = postgres(&bed, &scratch.file("data"));
    server
        .exec_command(&[], ["pgbench", "-i", "-s", "2", "postgres"])
        .patience(seconds(180))
        .run()
        .success();
    let run = ["pgbench", "-T", "30", "-c", "4", "postgres"];
    let bench = server
        .exec_command(&[], run)
        .patience(seconds(90))
        .run()
        .success();
    assert!(
        bench.out().contains("number of failed transactions: 0"),
        "{}",
        bench.out()
    );
    sql(
        &server,
        "create table promise (n int); insert into promise select generate_series(1, 1000)",
    );

    // While more is written, the whole machine goes at once.
    let mut busy = server
        .exec_command(&[], ["pgbench", "-T", "60", "-c", "4", "postgres"])
        .spawn();
    std::thread::sleep(seconds(3));
    if bed.has_vm() {
        server.kill_9(&bed, PodProcess::Vmm);
    } else {
        server.task("kill", &["--all", "-s", "KILL"]).success();
    }
    eventually("it is seen to be gone", seconds(20), || {
        server
            .status()
            .is_none_or(|status| status == "STOPPED")
            .then_some(())
    });
    busy.end();
    server.remove();

    let server = postgres(&bed, &scratch.file("data"));
    assert_eq!(
        sql(&server, "select count(*), sum(n) from promise"),
        "1000|500500"
    );
    // Every pgbench transaction adds the same delta to an account, a teller and a branch and
    // writes it down: committed wholly or not at all, the sums agree.
    let sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(bbalance) from pgbench_branches) \
                and (select sum(tbalance) from pgbench_tellers) = (select sum(delta) from pgbench_history)";
    // The second run's history comes on top of the first run's, which its vacuum emptied with the
    // tables' sums kept: compare accounts, branches and tellers.
    let sums = sums.replace(
        "(select sum(delta) from pgbench_history)",
        "(select sum(bbalance) from pgbench_branches)",
    );
    assert_eq!(sql(&server, &sums), "t");
    sql(
        &server,
        "select count(*) from pgbench_accounts where aid is null",
    );
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn dpkg_installs_many_packages() {
    let bed = Bed::get();
    // Some 8,000 files: an hour of emulation, where a dozen small packages have to do.
    let line = if bed.kind() == Kind::Native {
        "cd /opt/debs; n=$(ls *.deb | wc -l); { dpkg -i *.deb || { dpkg -i python3-minimal_*.deb && dpkg -i python3_*.deb; }; } >/tmp/log 2>&1 || { tail -n 20 /tmp/log; exit 1; }; \
         test \"$n\" -ge 50 && dpkg --audit && gcc --version | head -n 1 && git --version && \
         echo 'int main(void){return 42;}' >/tmp/a.c && gcc -o /tmp/a /tmp/a.c && /tmp/a; echo ended with $?"
    } else {
        "cd /opt/debs; dpkg --force-depends -i $(ls -rS lib*.deb | head -n 12) >/tmp/log 2>&1 || { tail -n 20 /tmp/log; exit 1; }; \
         test $(grep -c '^Setting up' /tmp/log) -eq 12 && (exit 42); echo ended with $?"
    };
    let run = bed.nerdctl_run(
        &["--memory", "768m"],
        &bed.image("packages"),
        &["sh", "-c", line],
    );
    let said = run.patience(seconds(500)).run().success().out();
    assert!(said.ends_with("ended with 42"), "{said}");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn python_builds_a_tree_of_many_files() {
    const PROGRAM: &str = r"
import hashlib, os, sys
count = int(sys.argv[1])
for n in range(count):
    folder = f'/home/tree/{n % 20}/{n % 400}'
    os.makedirs(folder, exist_ok=True)
    with open(f'{folder}/{n}', 'w') as file:
        file.write(str(n) * 10)
seen = 0
for folder, folders, files in os.walk('/home/tree'):
    for name in files:
        path = os.path.join(folder, name)
        assert open(path).read() == name * 10, path
        assert os.stat(path).st_size == len(name) * 10
        seen += 1
        if int(name) % 2:
            os.rename(path, path + '.odd')
        else:
            os.unlink(path)
left = sum(len(files) for _, _, files in os.walk('/home/tree'))
print(seen, left)
";
    let bed = Bed::get();
    let count = scaled(&bed, 20_000, 2_000);
    let argv = ["python3", "-c", PROGRAM, &count.to_string()];
    let run = bed
        .nerdctl_run(&[], &bed.image("python"), &argv)
        .patience(seconds(400))
        .run();
    assert_eq!(run.success().out(), format!("{count} {}", count / 2));
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn git_clones_and_checks() {
    let bed = Bed::get();
    let line = "cd /home && git clone -q file:///usr/src/lua copy && cd copy && git fsck --full --strict 2>&1 && \
                git log --oneline | wc -l && git gc -q && git fsck --full && git status --porcelain | wc -l";
    let run = bed.nerdctl_run(
        &["--memory", "512m"],
        &bed.image("dev"),
        &["sh", "-c", line],
    );
    let said = run.patience(seconds(200)).run().success().out();
    assert_eq!(said.lines().last(), Some("0"), "{said}");
    assert!(said.lines().any(|line| line == "41"), "{said}");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn gcc_compiles_a_project() {
    let bed = Bed::get();
    let line = "cp -r /usr/src/lua/src /home/src && cd /home/src && \
                echo '#define DEB_HOST_MULTIARCH \"x86_64-linux-gnu\"' >lua5.4-deb-multiarch.h && \
                gcc -O1 -DLUA_USE_POSIX -o /home/lua $(ls *.c | grep -vx luac.c) -lm -ldl && \
                /home/lua -e 'local t = {} for n = 1, 100000 do t[n] = n end print(#t, _VERSION)'";
    let run = bed.nerdctl_run(
        &["--memory", "512m"],
        &bed.image("dev"),
        &["sh", "-c", line],
    );
    let said = run.patience(seconds(400)).run().success().out();
    assert_eq!(said.lines().last(), Some("100000\tLua 5.4"), "{said}");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_debian_container_is_debian() {
    let bed = Bed::get();
    let debian = bed.image("debian");
    let container = bed.named(Client::Ctr, "debian");
    let command = [
        "ctr",
        "run",
        "--rm",
        "--runtime",
        bed.runtime(),
        &debian,
        container.id(),
    ];
    let line = ". /etc/os-release; echo $ID $VERSION_CODENAME; dpkg -l | grep -c ^ii; id -un";
    let said = bed
        .command(command)
        .args(["bash", "-c", line])
        .run()
        .success()
        .out();
    let lines: Vec<_> = said.lines().collect();
    assert_eq!((lines[0], lines[2]), ("debian bookworm", "root"));
    assert!(lines[1].parse::<u32>().expect("a number") > 50, "{said}");
}
