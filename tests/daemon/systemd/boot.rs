//! The units under a real systemd, booted in namespaces of its own by `tests/systemd/machine`: what an
//! operator does all day, and what must never happen to clients meanwhile.
//!
//! Needs root and Debian's packages systemd, util-linux, procps and iproute2. Where a machine can't be
//! booted, the tests say so and do nothing else.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    thread,
    time::Duration,
};

use crate::common::{
    self,
    client::{KeepAlive, Load},
    frozen::Frozen,
    machine::Machine,
    proc, www,
};

/// A machine with lbd in it, installed as README says, but not started. `None` where none can be
/// booted.
fn boot() -> Option<Machine> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let binary = Path::new(env!("CARGO_BIN_EXE_lbd"));
    let machine = Machine::boot(&[source, binary.parent().unwrap()])?;
    machine.run(&format!(
        "mkdir -p /srv/lbd/target/release /srv/www && cd /srv/lbd
         cp -r /host{source}/lb.toml /host{source}/systemd . && cp /host{binary} target/release
         cp -r /host{www}/. /srv/www
         {installation}
         systemctl daemon-reload",
        source = source.display(),
        binary = binary.display(),
        www = www().display(),
        installation = installation(),
    ));
    Some(machine)
}

/// The commands of README that install files.
fn installation() -> String {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = fs::read_to_string(readme).unwrap();
    let section = readme.split("\n## As a service\n").nth(1).unwrap();
    let script = section.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    let lines: Vec<_> = script.lines().filter(|line| line.starts_with("install ")).collect();
    assert!(lines.len() > 2, "{script}");
    lines.join("\n")
}

/// What lbd and systemd said of the service, each with its priority.
fn journal(machine: &Machine) -> Vec<(String, String)> {
    let lines = machine.run("journalctl -u lbd -o json");
    let parse = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    lines.lines().map(parse).map(|line| (text(&line["PRIORITY"]), text(&line["MESSAGE"]))).collect()
}

const WEB: &str = "[service.web]\nlisten = \"127.0.0.1:44444\"\nroot = \"/srv/www\"\n\
    ports = [9002, 9003, 9004, 9005]\n";

fn address() -> SocketAddr {
    "127.0.0.1:44444".parse().unwrap()
}

#[test]
fn a_day_of_operations() {
    let Some(machine) = boot() else { return };
    machine.join_network();
    machine.write("/etc/lbd/lb.toml", WEB);

    // Without the socket unit first: lbd binds its address itself.
    machine.run("systemctl enable --now lbd.service");
    machine.wait("StatusText", "serving, 4 of 4 workers healthy");
    machine.run("systemctl stop lbd.service");
    assert!(TcpStream::connect(address()).is_err(), "nobody is there");
    machine.run("systemctl enable lbd.socket && systemctl start lbd.service");
    machine.run("journalctl -u lbd | grep -q 'listening .*socket=lbd.socket'");
    assert_eq!(machine.show("NRestarts"), "0");

    // Nobody of them is root or can become it, and each has its cgroup.
    let (main, workers) = (machine.main_pid(), machine.workers());
    for (pid, capabilities) in
        workers.iter().map(|pid| (pid, 0)).chain([(&main, 1_u64 << 10 | 1 << 39)])
    {
        let status = machine.run(&format!("cat /proc/{pid}/status"));
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().to_owned()
        };
        assert!(field("Uid:").parse::<u32>().unwrap() > 1000, "{status}");
        assert_eq!(u64::from_str_radix(&field("CapPrm:"), 16).unwrap(), capabilities, "{status}");
        assert_eq!(field("NoNewPrivs:"), "1");
    }
    let mut cgroups: Vec<_> =
        workers.iter().map(|pid| machine.run(&format!("grep '^0::' /proc/{pid}/cgroup"))).collect();
    assert!(
        cgroups.iter().all(|path| path.contains(&format!("lbd.service/lbd-{main}-"))),
        "{cgroups:?}"
    );
    cgroups.dedup();
    assert_eq!(cgroups.len(), 4);

    let load = Load::start(address(), "/page.html");
    load.more(50);
    a_good_and_a_bad_reload(&machine);
    assert_eq!(machine.workers(), workers, "untouched");
    load.more(50);
    for _ in 0..3 {
        machine.run("systemctl restart lbd.service");
        load.more(50);
    }
    load.end_without_failure();
    assert_eq!(machine.show("NRestarts"), "0");
    the_journal_has_levels(&machine);

    its_main_process_is_killed(&machine);
    a_data_thread_hangs(&machine);
    machine.stop_and_look();
}

fn a_good_and_a_bad_reload(machine: &Machine) {
    let good = WEB.replace("[service.web]", "[service.web]\nbalance = \"least-connections\"");
    machine.write("/etc/lbd/lb.toml", &good);
    machine.run("systemctl reload lbd.service");
    machine.run("timeout 20 journalctl -u lbd -f -n all | grep -q -m 1 'reloaded .*changed=1'");
    machine.wait("StatusText", "serving, 4 of 4 workers healthy");

    machine.write("/etc/lbd/lb.toml", &WEB.replace("ports", "prots"));
    machine.run("systemctl reload lbd.service || true");
    let status = machine.wait("StatusText", "; the last reload failed: ");
    assert!(status.contains("prots"), "{status}");
    assert_eq!(machine.show("ActiveState"), "active");
    machine.write("/etc/lbd/lb.toml", &good);
    machine.run("systemctl reload lbd.service");
    machine.wait("StatusText", "serving, 4 of 4 workers healthy");
}

fn the_journal_has_levels(machine: &Machine) {
    let journal = journal(machine);
    for (message, priority) in
        [("listening", "6"), ("connection", "6"), ("reloaded", "6"), ("reload refused", "4")]
    {
        let is_it = |text: &str| text.contains(&format!(" {message} "));
        let line = journal.iter().find(|(_, text)| is_it(text)).unwrap();
        assert_eq!(line.0, priority, "{}", line.1);
    }
    assert!(journal.iter().all(|(_, text)| !text.starts_with('<')), "{journal:#?}");
}

fn its_main_process_is_killed(machine: &Machine) {
    let (main, workers) = (machine.main_pid(), machine.workers());
    machine.run(&format!("kill -9 {main}"));
    // Not refused, but held in the queue until there is another.
    for _ in 0..20 {
        let client = KeepAlive::new(address()).get("/page.html");
        assert!(client.is_ok_and(|(status, _)| status == 200));
    }
    machine.wait("NRestarts", "1");
    machine.wait("StatusText", "serving, 4 of 4 workers healthy");
    for pid in workers {
        let left = machine.attempt(&format!("test -e /proc/{pid}"));
        assert!(!left.status.success(), "{pid} is an orphan");
    }
    // lbd, what guards are forked from, a guard and a worker for each slot.
    assert_eq!(machine.run("pgrep --full --count '^lbd( |$)'"), "10");
}

fn a_data_thread_hangs(machine: &Machine) {
    machine.run(
        "mkdir -p /run/systemd/system/lbd.service.d
         printf '[Service]\\nWatchdogSec=2\\n' >/run/systemd/system/lbd.service.d/watchdog.conf
         systemctl daemon-reload && systemctl restart lbd.service",
    );
    // It lives on while nothing happens …
    let before = machine.main_pid();
    thread::sleep(Duration::from_secs(4));
    assert_eq!(machine.main_pid(), before);
    // … but not with a thread that hangs.
    let threads = proc::threads(machine.outside(before));
    let (tid, _) = threads.iter().find(|(_, name)| name.starts_with("lbd-data-")).unwrap();
    let restarts: u32 = machine.show("NRestarts").parse().unwrap();
    let frozen = Frozen::thread(*tid);
    machine.run("timeout 30 journalctl -u lbd -f -n all | grep -q -m 1 'Watchdog timeout'");
    // Killed it is then, but one that is traced can't go before its tracer knows.
    frozen.thaw();
    machine.wait("NRestarts", &(restarts + 1).to_string());
    machine.wait("StatusText", "serving, 4 of 4 workers healthy");
    assert_ne!(machine.main_pid(), before);
    assert!(KeepAlive::new(address()).get("/page.html").is_ok());
}

#[test]
fn the_kernel_hands_out_connections_for_the_unit_that_is_no_root() {
    let Some(machine) = boot() else { return };
    machine.join_network();
    let direct = WEB.replace("[service.web]", "[service.web]\nroute = \"direct\"");
    machine.write("/etc/lbd/lb.toml", &direct);

    // The socket of lbd.socket is root's, and others can't listen beside it.
    machine.run("systemctl start lbd.socket");
    assert!(!machine.attempt("systemctl start lbd.service").status.success());
    machine.run("journalctl -u lbd | grep -q \"listen beside this one, which is another user's\"");
    machine.run("systemctl stop lbd.service lbd.socket && systemctl reset-failed");

    machine.run("systemctl start lbd.service");
    machine.run("journalctl -u lbd | grep -q 'steering .*kind=ebpf'");
    let load = Load::start(address(), "/page.html");
    load.more(50);
    machine.write("/etc/lbd/lb.toml", &direct.replace(", 9005", ""));
    machine.run("systemctl reload lbd.service");
    machine.wait("StatusText", "serving, 3 of 3 workers healthy");
    load.more(50);
    let killed = machine.workers()[0];
    machine.run(&format!("kill -9 {killed}"));
    load.more(50);
    machine.wait("StatusText", "serving, 3 of 3 workers healthy");
    // What the worker was answering is lost, and nothing else.
    assert!(load.end().len() <= Load::CLIENTS);
    let load = Load::start(address(), "/page.html");
    machine.run("lbd restart web --config /etc/lbd/lb.toml");
    load.more(50);
    load.end_without_failure();
    machine.run("systemctl stop lbd.service");
    assert!(TcpStream::connect(address()).is_err(), "nobody is there");
    machine.stop_and_look();
}

#[test]
fn a_wrong_file_is_not_tried_again_and_what_is_missing_is_said() {
    let Some(machine) = boot() else { return };
    machine.write("/etc/lbd/lb.toml", &WEB.replace("ports", "prots"));
    assert!(!machine.attempt("systemctl start lbd.service").status.success());
    assert_eq!(machine.show("ExecMainStatus"), "78");
    assert_eq!(machine.show("ActiveState"), "failed");
    assert_eq!(machine.show("NRestarts"), "0");
    let why = journal(&machine).into_iter().find(|(_, text)| text.contains("prots")).unwrap();
    assert_eq!(why.0, "3", "{}", why.1);

    // One that does not start leaves the other alone, and systemd waits with it.
    let api =
        "[service.api]\nlisten = \"127.0.0.1:44445\"\nworkers = 1\ncommand = [\"/no/such\"]\n";
    machine.write("/etc/lbd/lb.toml", &(WEB.to_owned() + api));
    machine.run("systemctl start --no-block lbd.service");
    let status = machine.wait("StatusText", "4 of 5 workers healthy; api has none of 1 (");
    assert!(status.starts_with("starting, "), "{status}");
    assert_eq!(machine.show("ActiveState"), "activating");
    machine.write("/etc/lbd/lb.toml", WEB);
    machine.run("kill -HUP $(systemctl show --property MainPID --value lbd)");
    machine.wait("ActiveState", "active");
    machine.stop_and_look();
}

#[test]
fn workers_in_other_languages_run_as_hardened_and_as_other_users() {
    let Some(machine) = boot() else { return };
    machine.join_network();
    let has = |program: &str| machine.attempt(&format!("command -v {program}")).status.success();
    let mut services: Vec<String> = Vec::new();
    let address = |number: usize| -> SocketAddr {
        ([127, 0, 0, 1], 8001 + u16::try_from(number).unwrap()).into()
    };
    let mut add = |name: &str, command: &str, more: &str| {
        let listen = address(services.len());
        services.push(format!(
            "[service.{name}]\nlisten = \"{listen}\"\nworkers = 2\ncommand = {command}\n{more}\n"
        ));
    };
    add("built-in", r#"["lbd", "worker", "--root", "/srv/www"]"#, "health.http = \"/page.html\"");
    if has("python3") {
        let python = r#"["python3", "-m", "http.server", "--bind", "127.0.0.1", "{port}"]"#;
        add("python", python, "directory = \"/srv/www\"");
    }
    if has("node") {
        // It compiles at run time, and reads /proc.
        let serve =
            "require(`http`).createServer((_, a) => a.end(`${require(`os`).cpus().length}`))";
        let node = format!(r#"["node", "-e", "{serve}.listen(process.env.PORT, `127.0.0.1`)"]"#);
        add("node", &node, "");
    }
    let is_served = |path: &str| {
        for (number, service) in services.iter().enumerate() {
            let answer = KeepAlive::new(address(number)).get(path);
            assert_eq!(answer.unwrap().0, 200, "{service}");
        }
    };
    machine.write("/etc/lbd/lb.toml", &services.concat());
    machine.run("systemctl start lbd.service");
    is_served("/page.html");

    // Python and Rust do without what hardening.conf takes away; Node's compiler doesn't.
    let source = env!("CARGO_MANIFEST_DIR");
    let drop_in = |name: &str| {
        machine.run(&format!(
            "rm -rf /etc/systemd/system/lbd.service.d && mkdir /etc/systemd/system/lbd.service.d
             cp /host{source}/systemd/lbd.service.d/{name} /etc/systemd/system/lbd.service.d/
             systemctl daemon-reload && systemctl restart lbd.service"
        ));
    };
    let hardened: Vec<_> =
        services.iter().filter(|service| !service.contains("[\"node\"")).cloned().collect();
    machine.write("/etc/lbd/lb.toml", &hardened.concat());
    drop_in("hardening.conf");
    let memory = machine.run(&format!(
        "grep -h Seccomp: /proc/{}/status && ls /proc | grep -c '[a-z]' || true",
        machine.workers()[0]
    ));
    assert!(memory.starts_with("Seccomp:\t2"), "{memory}");
    machine.stop_and_look();

    // As another user, which only root can.
    let user = services.concat().replace("\nworkers", "\nuser = \"nobody\"\nworkers");
    machine.write("/etc/lbd/lb.toml", &user);
    drop_in("per-worker-user.conf");
    is_served("/page.html");
    for pid in machine.workers() {
        let status =
            machine.run(&format!("grep -E '^(Uid|CapPrm|CapBnd|Groups):' /proc/{pid}/status"));
        assert!(status.contains("Uid:\t65534\t65534"), "{status}");
        assert!(status.contains("CapPrm:\t0000000000000000"), "{status}");
    }
    machine.run("systemctl reload lbd.service");
    machine.stop_and_look();
}

#[test]
fn processes_are_limited_where_the_controller_is_there() {
    let Some(machine) = boot() else { return };
    machine.join_network();
    let limited = format!("{WEB}limits.processes = 20\n");
    machine.write("/etc/lbd/lb.toml", &limited);
    let start = machine.attempt("systemctl start lbd.service");
    if machine.run("cat /sys/fs/cgroup/cgroup.controllers").contains("pids") {
        for pid in machine.workers() {
            let most = machine.run(&format!(
                "cat /sys/fs/cgroup$(sed -n 's/^0:://p' /proc/{pid}/cgroup)/pids.max"
            ));
            assert_eq!(most, "20");
        }
    } else {
        eprintln!("cgroup v2 has no pids controller here: that lbd says so is all that is tested");
        assert!(!start.status.success());
        assert_eq!(machine.show("ExecMainStatus"), "78");
        machine.run("journalctl -u lbd | grep -q 'has no pids controller'");
    }
}

#[test]
fn nothing_of_a_machine_is_left_when_its_test_is_killed() {
    let Some(mut machine) = boot() else { return };
    let cgroups = machine.run("stat -f -c %T /sys/fs/cgroup");
    assert_eq!(cgroups, "cgroup2fs");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    drop(listener);
    let init = machine.init;
    machine.end();
    common::eventually("its init is gone", || !Path::new(&format!("/proc/{init}")).exists());
}
