//! The command line, and what it says to input that is wrong.

use std::{fs, net::TcpListener, os::unix::fs::PermissionsExt, path::Path, process::Output};

use crate::common::{
    Daemon, Mark, Ports,
    client::{get, turns},
    command, fixture, lbd,
};

/// Exit status and standard error of a command that says nothing else.
fn refused(folder: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = lbd(folder, arguments);
    assert_eq!(output.stdout, b"", "{output:?}");
    (output.status.code(), text(output.stderr))
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

/// What `lbd` and `lbd check` say to `config`, which must be the same.
fn refusal(config: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lb.toml"), config).unwrap();
    let (status, error) = refused(folder.path(), &["--config", "lb.toml"]);
    assert_eq!(status, Some(78), "{error}");
    assert_eq!(refused(folder.path(), &["check"]), (Some(78), error.clone()));
    error
}

#[test]
fn wrong_usage_is_2() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["--no-such-option"][..],
        &["frobnicate"],
        &["--config"],
        &["check", "unexpected"],
        &["run", "--listen", "127.0.0.1:1"],
        &["run", "--", "true"],
        &["run", "--listen", "127.0.0.1:1", "--workers", "many", "--", "true"],
        &["worker"],
        &["--config", "lb.toml", "check"],
    ] {
        let (status, error) = refused(folder.path(), arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {error}");
        assert!(error.starts_with("error: "), "{error}");
    }
}

#[test]
fn version_has_number_and_commit() {
    let output = lbd(Path::new("/"), &["--version"]);
    assert_eq!((output.status.code(), output.stderr), (Some(0), Vec::new()));
    let line = text(output.stdout);
    let rest = line.strip_prefix(&format!("lbd {} (", env!("CARGO_PKG_VERSION"))).unwrap();
    let commit = rest.strip_suffix(")\n").unwrap();
    let hexadecimal = commit.len() == 12 && commit.bytes().all(|b| b.is_ascii_hexdigit());
    assert!(hexadecimal || commit == "unknown", "{line}");
}

#[test]
fn help_has_an_example_for_each_command() {
    for (arguments, example) in [
        (&["--help"][..], "Example: lbd --config lb.toml"),
        (
            &["run", "--help"],
            "Example: lbd run --listen 127.0.0.1:8080 --workers 4 -- node server.js",
        ),
        (&["check", "--help"], "Example: lbd check --config lb.toml"),
        (&["worker", "--help"], "Example: lbd worker --root www"),
        (&["bench", "--help"], "Example: lbd bench --concurrency 1,10,100 --plot comparison.svg"),
    ] {
        let Output { status, stdout, stderr } = lbd(Path::new("/"), arguments);
        assert_eq!((status.code(), stderr), (Some(0), Vec::new()));
        let help = text(stdout);
        assert!(help.contains(example) && help.contains("Usage: lbd"), "{help}");
    }
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lb.toml"), ports.service(&command(&["http"]))).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_lbd"))
        .arg("check")
        .current_dir(folder.path())
        .stdout(writer)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn check_prints_a_line_for_each_service() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("www")).unwrap();
    fs::write(
        folder.path().join("lb.toml"),
        "[service.web]\nlisten = \"127.0.0.1:44444\"\nroot = \"www\"\nports = [9002, 9003]\n\
         [service.api]\nlisten = [\"[::1]:80\", \"unix:api.sock\"]\nworkers = 1\n\
         command = [\"node\", \"server js\"]\nbalance = \"least-connections\"\n\
         health = { http = \"/up\", expect = [204, \"300-399\"], interval = \"5s\" }\n",
    )
    .unwrap();
    let output = lbd(folder.path(), &["check"]);
    assert_eq!((output.status.code(), text(output.stderr)), (Some(0), String::new()));
    let at = folder.path().display();
    assert_eq!(
        text(output.stdout),
        format!(
            "web: listen 127.0.0.1:44444; 2 workers on 127.0.0.1, ports 9002, 9003; root {at}/www; \
             route proxy; balance round-robin; probe http / expecting 100-599 every 1s\n\
             api: listen [::1]:80, unix:{at}/api.sock; 1 worker on free ports of 127.0.0.1; \
             command node \"server js\"; route proxy; balance least-connections; \
             probe http /up expecting 204, 300-399 every 5s\n"
        )
    );
}

#[test]
fn check_warns_of_what_is_not_there_yet() {
    let folder = tempfile::tempdir().unwrap();
    let config = "[log]\nfile = \"no/lbd.log\"\n[service.web]\nlisten = \"unix:no/web.sock\"\n\
        command = [\"no-such-program\", \"$PORT\"]\nuser = \"no-such-user\"\noutput = \"no/out.log\"\n";
    fs::write(folder.path().join("lb.toml"), config).unwrap();
    let output = lbd(folder.path(), &["check"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(output.stdout).starts_with("web: "));
    let said = text(output.stderr);
    let lines: Vec<&str> = said.lines().collect();
    let expected = [
        "lb.toml:2: log.file: warning: ",
        "lb.toml:4: service.web.listen: warning: ",
        "lb.toml:5: service.web.command: warning: there is no program \"no-such-program\" in PATH",
        "lb.toml:5: service.web.command: warning: $PORT is not replaced there; write {port}",
        "lb.toml:6: service.web.user: warning: there is no user \"no-such-user\" yet",
        "lb.toml:7: service.web.output: warning: ",
    ];
    assert_eq!(lines.len(), expected.len(), "{said}");
    for (line, expected) in lines.iter().zip(expected) {
        assert!(line.starts_with(expected), "{line}");
    }
    // The built-in worker's folder is what it serves: without it there is nothing to run.
    fs::write(
        folder.path().join("lb.toml"),
        "[service.web]\nlisten = \"127.0.0.1:1\"\nroot = \"no\"\n",
    )
    .unwrap();
    assert_eq!(lbd(folder.path(), &["check"]).status.code(), Some(78));
}

#[test]
fn the_sample_is_valid() {
    let output = lbd(Path::new(env!("CARGO_MANIFEST_DIR")), &["check", "--config", "lb.toml"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(output.stdout).starts_with("web: listen 127.0.0.1:44444; 4 workers"));
}

#[test]
fn a_file_that_cannot_be_read_is_78() {
    let folder = tempfile::tempdir().unwrap();
    let missing = "lb.toml: no such file; write it, or name another with --config\n";
    assert_eq!(refused(folder.path(), &[]), (Some(78), missing.to_owned()));
    assert_eq!(refused(folder.path(), &["check"]), (Some(78), missing.to_owned()));
    let directory = ".: a directory; expected a file such as lb.toml\n";
    assert_eq!(refused(folder.path(), &["--config", "."]), (Some(78), directory.to_owned()));
    fs::write(folder.path().join("binary"), b"[log]\n\xff\xfe").unwrap();
    let binary = "binary:2: not UTF-8 text; save the file as UTF-8\n";
    assert_eq!(refused(folder.path(), &["--config", "binary"]), (Some(78), binary.to_owned()));
    if !nix::unistd::geteuid().is_root() {
        let path = folder.path().join("secret");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
        let denied = "secret: permission denied; let the user that lbd runs as read it\n";
        assert_eq!(refused(folder.path(), &["--config", "secret"]), (Some(78), denied.to_owned()));
    }
}

#[test]
fn every_error_of_a_file_is_told_at_once_with_its_line_and_key() {
    assert_eq!(
        refusal(
            "[log]\nlevel = \"loud\"\n[service.web]\nlisten = \"127.0.0.1:80\"\nroot = \"nowhere\"\n\
             ports = [9002, 9002]\nworkers = 2\nhealth.interval = \"0s\"\nroute = \"http\"\n"
        )
        .lines()
        .map(|line| line.split(": ").take(2).collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>(),
        [
            "lb.toml:2 log.level",
            "lb.toml:5 service.web.root",
            "lb.toml:6 service.web.ports",
            "lb.toml:7 service.web.workers",
            "lb.toml:8 service.web.health.interval",
            "lb.toml:9 service.web.route",
        ]
    );
}

#[test]
fn what_is_wrong_and_what_would_be_right_is_one_sentence() {
    for (config, sentence) in [
        ("[service.web\n", "lb.toml:1: not valid TOML: unclosed table, expected `]`\n"),
        (
            "",
            "lb.toml: no service; add one such as [service.web], with `listen` and `command` or `root`\n",
        ),
        (
            "[service.web]\nlisten = \"127.0.0.1:80\"\ncommand = []\n",
            "lb.toml:3: service.web.command: empty; expected an array such as [\"node\", \"server.js\"]\n",
        ),
        (
            "[service.web]\nlisten = \"127.0.0.1:80\"\ncommand = [\"x\"]\nbalnce = \"round-robin\"\n",
            "lb.toml:4: service.web.balnce: unknown key; did you mean `balance`?\n",
        ),
        (
            "[admin]\nlisten = \"localhost:81\"\n[service.web]\nlisten = \"127.0.0.1:80\"\ncommand = [\"x\"]\n",
            "lb.toml:2: admin.listen: \"localhost:81\" has a name in it; write \"127.0.0.1:81\"\n",
        ),
    ] {
        assert_eq!(refusal(config), sentence);
    }
}

#[test]
fn a_root_that_is_no_folder_is_78() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let config =
        |root: &Path| format!("[service.web]\nlisten = \"127.0.0.1:80\"\nroot = {root:?}\n");
    for root in [file.as_path(), &folder.path().join("missing")] {
        let error = refusal(&config(root));
        assert!(error.starts_with("lb.toml:3: service.web.root: "), "{error}");
        assert!(error.contains(root.to_str().unwrap()) && error.contains("folder"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn a_port_that_is_taken_is_1_and_leaves_nothing() {
    let ports = Ports::take(2);
    let _somebody = TcpListener::bind(ports.address()).unwrap();
    let mut daemon = Daemon::start(&ports.service(&command(&["http"])));
    assert_eq!(daemon.wait_exit().code(), Some(1));
    daemon.assert_nothing_runs();
    let said = daemon.log.text();
    let error = said.lines().find(|line| line.starts_with("lbd: service web: "));
    let error = error.unwrap_or_else(|| panic!("{said}"));
    assert!(error.contains(&ports.address().to_string()), "{error}");
    assert!(error.contains("in use") && error.contains("ss -"), "{error}");
    assert!(daemon.said(Mark::START, "worker started").is_empty());
    for port in ports.all() {
        TcpListener::bind(("127.0.0.1", port)).unwrap();
    }
}

#[test]
fn a_port_taken_in_the_ephemeral_range_says_so() {
    let ports = Ports::take(1);
    // One that the kernel picked is in that range.
    let somebody = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = somebody.local_addr().unwrap().to_string();
    let config = ports.service(&command(&["http"])).replace(&ports.address().to_string(), &address);
    let mut daemon = Daemon::start(&config);
    assert_eq!(daemon.wait_exit().code(), Some(1));
    let said = daemon.log.text();
    assert!(said.contains(&address), "{said}");
    assert!(said.contains("net.ipv4.ip_local_reserved_ports"), "{said}");
}

#[test]
fn one_of_two_addresses_taken_is_1_and_the_other_is_let_go() {
    let (free, taken) = (Ports::take(1), Ports::take(0));
    let _somebody = TcpListener::bind(taken.address()).unwrap();
    let config = free.service(&command(&["http"])).replace(
        &format!("\"{}\"", free.address()),
        &format!("[\"{}\", \"{}\"]", free.address(), taken.address()),
    );
    let mut daemon = Daemon::start(&config);
    assert_eq!(daemon.wait_exit().code(), Some(1));
    assert!(daemon.log.text().contains(&taken.address().to_string()));
    TcpListener::bind(free.address()).unwrap();
}

#[test]
fn run_needs_no_file() {
    let ports = Ports::take(0);
    let listen = ports.address().to_string();
    let fixture = fixture();
    let words = [
        "run",
        "--listen",
        &listen,
        "--workers",
        "3",
        "--",
        &fixture,
        "http",
        "on-{port}",
        "--",
        "-x",
    ];
    let mut daemon = Daemon::spawn(tempfile::tempdir().unwrap(), &words);
    daemon.wait_healthy(Mark::START, 3);
    let seen = turns(ports.address(), 6);
    assert_eq!(seen[..3], seen[3..]);
    let port: u16 = seen[0];
    let argv = get(([127, 0, 0, 1], port).into(), "/argv");
    assert_eq!(argv, format!("http\non-{port}\n--\n-x"));
    assert_eq!(Path::new(&get(ports.address(), "/directory")), daemon.folder.path());
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    daemon.wait_stopped();
}

#[test]
fn run_refuses_what_a_file_would() {
    let folder = tempfile::tempdir().unwrap();
    let run = |listen: &str, workers: &str| {
        refused(folder.path(), &["run", "--listen", listen, "--workers", workers, "--", "true"])
    };
    let (status, error) = run("localhost:80", "0");
    assert_eq!(status, Some(2));
    assert_eq!(
        error,
        "--listen: \"localhost:80\" has a name in it; write \"127.0.0.1:80\"\n\
         --workers: expected a number from 1 to 1024, found 0\n"
    );
}

#[test]
fn a_slot_that_is_none_is_answered_by_what_one_is() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [["drain", "web", "x"], ["resume", "web", "1.5"], ["restart", "web", ""]] {
        let output = lbd(folder.path(), &arguments);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let said = text(output.stderr);
        let (given, expected) = (arguments[2], "expected the number of a slot, such as 0; ");
        assert!(said.contains(&format!("'{given}'")) && said.contains(expected), "{said}");
    }
}
