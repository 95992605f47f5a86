//! What another user of the machine can do to a daemon, and to who operates it: nothing. And what
//! somebody who tidies up can: nothing for long.

use std::{
    ffi::OsStr,
    fs::{self, File, Permissions},
    io::{Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, chown, symlink},
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::common::{self, Daemon, Mark, Ports, command, eventually, kill_hard, needs};
use nix::{
    sys::{signal::Signal::SIGTERM, stat::Mode},
    unistd::{geteuid, mkfifo},
};
use tempfile::TempDir;

const NOBODY: u32 = 65534;

/// A folder with a configuration and with the folders `run` and `session`, all of which others may look
/// into.
fn prepare(config: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    set_mode(folder.path(), 0o755);
    for name in ["run", "session", "session/lbd"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    fs::write(folder.path().join("lb.toml"), config).unwrap();
    folder
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// `lbd`, whose sockets are in the folder `run` if that will do.
fn lbd(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lbd"));
    command.args(arguments).current_dir(folder).stdin(Stdio::null());
    command.env("RUNTIME_DIRECTORY", folder.join("run"));
    command.env("XDG_RUNTIME_DIR", folder.join("session"));
    command
}

fn start(folder: TempDir, workers: usize) -> Daemon {
    let command = lbd(folder.path(), &["--config", "lb.toml"]);
    let daemon = Daemon::run(folder, command);
    daemon.wait_healthy(Mark::START, workers);
    daemon
}

/// Runs a command on the daemon in `folder` to its end.
fn ask(folder: &Path, arguments: &[&str]) -> Output {
    lbd(folder, &[arguments, &["--config", "lb.toml"]].concat()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn is_clean(bytes: &[u8]) -> bool {
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    !text.contains(|c: char| c.is_control() && c != '\n')
        && !text.contains(['\u{202e}', '\u{2066}', '\u{200f}', '\u{61c}'])
}

/// What the socket of the daemon with this configuration is called.
fn socket_name(folder: &Path) -> String {
    let output = ask(folder, &["status"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = text(&output.stderr);
    let (_, rest) = said.split_once("/run/").unwrap();
    rest.split_once(".sock").unwrap().0.to_owned() + ".sock"
}

fn sockets(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder.join("run")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_lock_of_another_user_holds_up_neither_start_nor_end() {
    let ports = Ports::take(1);
    let folder = prepare(&ports.service(&command(&["http"])));
    // As systemd makes it, without RuntimeDirectoryMode=: everybody can open it, and so lock it.
    set_mode(&folder.path().join("run"), 0o755);
    let lock = File::open(folder.path().join("run")).unwrap();
    lock.lock().unwrap();
    let began = Instant::now();
    let mut daemon = start(folder, 1);
    let line = daemon.wait(Mark::START, "the admin socket is not as it should be", &[]);
    assert!(line.get("error").unwrap().starts_with("somebody holds a lock on "), "{}", line.raw);
    assert!(ask(daemon.folder.path(), &["status"]).status.success());
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(sockets(daemon.folder.path()).is_empty());
}

#[test]
fn what_another_user_puts_in_the_way_is_passed_over() {
    if !needs::is_root() {
        return;
    }
    let ports = Ports::take(1);
    let folder = prepare(&ports.service(&command(&["http"])));
    let name = socket_name(folder.path());
    let foreign = folder.path().join("session/lbd");
    // A link to a socket of root's, which is no lbd.
    let elsewhere = UnixListener::bind(folder.path().join("other.sock")).unwrap();
    elsewhere.set_nonblocking(true).unwrap();
    symlink(folder.path().join("other.sock"), foreign.join(&name)).unwrap();
    std::os::unix::fs::lchown(foreign.join(&name), Some(NOBODY), Some(NOBODY)).unwrap();
    chown(&foreign, Some(NOBODY), Some(NOBODY)).unwrap();
    // And the one that is to be used can be written to by others.
    set_mode(&folder.path().join("run"), 0o777);
    let mut daemon = start(folder, 1);
    let said = daemon.said(Mark::START, "the admin socket is not as it should be");
    let is_told = |line: &common::Line| line.raw.contains("/run: others may write to it");
    assert!(said.iter().any(is_told), "{said:?}");
    assert!(ask(daemon.folder.path(), &["status"]).status.success());
    assert!(elsewhere.accept().is_err(), "nobody is connected to");
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
}

#[test]
fn a_socket_that_takes_nobody_keeps_nobody_from_starting() {
    if !needs::is_root() {
        return;
    }
    let ports = Ports::take(1);
    let folder = prepare(&ports.service(&command(&["http"])));
    let foreign = folder.path().join("session/lbd");
    let path = foreign.join(socket_name(folder.path()));
    let full = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    full.bind(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
    full.listen(0).unwrap();
    let _waiting = UnixStream::connect(&path).unwrap();
    chown(&foreign, Some(NOBODY), Some(NOBODY)).unwrap();
    let mut daemon = start(folder, 1);
    assert!(ask(daemon.folder.path(), &["status"]).status.success());
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
}

/// Answers whatever is asked like a daemon that has something bad to say, and counts who asks.
fn impostor(path: &Path) -> Arc<AtomicUsize> {
    let listener = UnixListener::bind(path).unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            count.fetch_add(1, Ordering::SeqCst);
            let _ = stream.read(&mut [0; 1024]);
            let body = "{\"error\":\"\u{9b}2J\\u001b]0;title\\u0007\u{202e}evil\\nsecond line\"}";
            let head = "HTTP/1.1 409 Conflict\r\nContent-Length";
            let _ = write!(stream, "{head}: {}\r\n\r\n{body}", body.len());
        }
    });
    asked
}

#[test]
fn a_false_daemon_is_neither_asked_nor_believed() {
    if !needs::is_root() {
        return;
    }
    let folder = prepare("");
    let foreign = folder.path().join("session/lbd");
    let socket = foreign.join(socket_name(folder.path()));
    let asked = impostor(&socket);
    chown(&foreign, Some(NOBODY), Some(NOBODY)).unwrap();
    for verb in ["status", "reload", "stop", "restart"] {
        let output = ask(folder.path(), &[verb]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = text(&output.stderr);
        assert!(said.starts_with("lbd: no lbd runs with "), "{said}");
        assert!(said.contains("session/lbd is passed over: it belongs to user 65534"), "{said}");
    }
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    // A folder of root's that it could get its socket into is no better.
    chown(&foreign, Some(0), Some(0)).unwrap();
    chown(&socket, Some(NOBODY), Some(NOBODY)).unwrap();
    let said = text(&ask(folder.path(), &["status"]).stderr);
    assert!(said.ends_with("belongs to user 65534, and neither to you nor to root\n"), "{said}");
    assert_eq!(asked.load(Ordering::SeqCst), 0);
}

#[test]
fn nothing_that_a_daemon_answers_is_obeyed() {
    let folder = prepare("");
    impostor(&folder.path().join("x.sock"));
    for verb in ["status", "reload", "stop"] {
        let mut command = lbd(folder.path(), &[verb, "--socket", "x.sock"]);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(is_clean(&output.stderr), "{output:?}");
        let said = text(&output.stderr);
        assert_eq!(said, "lbd: \u{fffd}2J␛]0;title␇\u{fffd}evil\nsecond line\n");
    }
}

#[test]
fn nothing_in_a_path_is_obeyed() {
    let ports = Ports::take(1);
    let service = ports.service(&command(&["http"]));
    let base = prepare("");
    // In a folder whose name would clear the screen.
    let folder = base.path().join("a\u{1b}[2J\u{202e}b");
    fs::create_dir(&folder).unwrap();
    let file = folder.join("lb.toml");
    fs::write(&file, "[service.web]\nworkers = 0\n").unwrap();
    let file = file.to_str().unwrap();
    for arguments in
        [&["check", "--config", file][..], &["--config", file], &["status", "--config", file]]
    {
        let output = lbd(base.path(), arguments).output().unwrap();
        assert!(!output.status.success());
        assert!(is_clean(&output.stderr) && is_clean(&output.stdout), "{output:?}");
        assert!(text(&output.stderr).contains("a␛[2J\u{fffd}b/lb.toml"), "{output:?}");
    }
    let output = lbd(base.path(), &["reload", "\u{1b}[31m"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(is_clean(&output.stderr), "{output:?}");
    // A daemon there, as itself and in the list of those that there are.
    fs::write(file, format!("[log]\nformat = \"json\"\n{service}")).unwrap();
    let command = lbd(base.path(), &["--config", file]);
    let daemon = Daemon::run(base, command);
    let base = daemon.folder.path();
    let status = || lbd(base, &["status", "--config", file]).output().unwrap();
    eventually("it answers", || status().status.success());
    let json = lbd(base, &["status", "--json", "--config", file]).output().unwrap();
    for output in [status(), json.clone(), lbd(base, &["status"]).output().unwrap()] {
        assert!(is_clean(&output.stderr) && is_clean(&output.stdout), "{output:?}");
    }
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["config"]["path"], file);
}

#[test]
fn a_pipe_or_a_device_in_the_place_of_the_file_holds_up_nobody() {
    let ports = Ports::take(1);
    let config = ports.service(&command(&["http"]));
    let mut daemon = Daemon::healthy(&config, 1);
    let file = daemon.path("lb.toml");
    let replace = |make: &dyn Fn(&Path)| {
        fs::remove_file(&file).unwrap();
        make(&file);
    };
    type Make<'a> = &'a dyn Fn(&Path);
    let cases: [(Make<'_>, &str); 4] = [
        (&|path| mkfifo(path, Mode::from_bits_truncate(0o600)).unwrap(), "not a regular file"),
        (&|path| symlink("/dev/zero", path).unwrap(), "not a regular file"),
        (&|path| fs::write(path, vec![b'#'; 1024 * 1024 + 1]).unwrap(), "more than 1.0 MiB"),
        (&|path| drop(UnixListener::bind(path).unwrap()), "not a regular file"),
    ];
    for (make, why) in cases {
        replace(make);
        let since = daemon.now();
        let output = daemon.lbd(&["reload"]);
        assert!(text(&output.stderr).contains(why), "{why}: {output:?}");
        daemon.wait(since, "reload refused", &[]);
        // So it does at a restart, which looks whether the file has changed, and by itself.
        assert!(daemon.lbd(&["restart"]).status.success());
        let output = daemon.lbd(&["check"]);
        assert_eq!(output.status.code(), Some(78), "{output:?}");
    }
    // A link is fine: /etc/lbd/lb.toml is one on many machines.
    fs::write(daemon.path("real.toml"), &config).unwrap();
    replace(&|path| symlink("real.toml", path).unwrap());
    assert!(daemon.lbd(&["reload"]).status.success());
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
}

#[test]
fn a_socket_that_somebody_removes_comes_back() {
    let ports = Ports::take(1);
    let folder = prepare(&ports.service(&command(&["http"])));
    let mut daemon = start(folder, 1);
    let base = daemon.folder.path().to_owned();
    let pids = daemon.pids(&ports);
    let comes_back = |what: &str| eventually(what, || ask(&base, &["status"]).status.success());
    let found = sockets(&base);
    assert_eq!(found.len(), 1);
    fs::remove_file(&found[0]).unwrap();
    assert_eq!(ask(&base, &["status"]).status.code(), Some(1));
    comes_back("the socket");
    assert_eq!(sockets(&base), found);
    assert_eq!(fs::metadata(&found[0]).unwrap().permissions().mode() & 0o7777, 0o600);
    daemon.wait(Mark::START, "the admin socket was gone, and is made again", &[]);
    fs::remove_dir_all(base.join("run")).unwrap();
    comes_back("the folder");
    assert_eq!(fs::metadata(base.join("run")).unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!(daemon.pids(&ports), pids);
    assert_eq!(text(&ask(&base, &["stop"]).stdout), "stopped\n");
    daemon.wait_stopped();
    assert!(sockets(&base).is_empty());
}

#[test]
fn so_does_the_link_to_one_elsewhere_and_that_one() {
    let ports = Ports::take(1);
    let service = ports.service(&command(&["http"]));
    let folder = prepare(&format!("[admin]\nsocket = \"own.sock\"\n{service}"));
    let mut daemon = start(folder, 1);
    let base = daemon.folder.path().to_owned();
    let found = sockets(&base);
    assert!(found[0].is_symlink());
    fs::remove_file(&found[0]).unwrap();
    eventually("the link", || ask(&base, &["status"]).status.success());
    assert_eq!(fs::read_link(&found[0]).unwrap(), base.join("own.sock"));
    fs::remove_file(base.join("own.sock")).unwrap();
    eventually("the socket", || ask(&base, &["status"]).status.success());
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert!(sockets(&base).is_empty() && !base.join("own.sock").exists());
}

#[test]
fn where_the_socket_comes_back_the_link_to_it_stays() {
    let ports = Ports::take(1);
    let service = ports.service(&command(&["http"]));
    let folder = prepare(&format!("[admin]\nsocket = \"own.sock\"\n{service}"));
    let mut daemon = start(folder, 1);
    let base = daemon.folder.path().to_owned();
    let link = sockets(&base).remove(0);
    fs::remove_file(base.join("own.sock")).unwrap();
    assert_eq!(ask(&base, &["status"]).status.code(), Some(1));
    eventually("the socket", || ask(&base, &["status"]).status.success());
    let again = "the admin socket was gone, and is made again";
    daemon.wait(Mark::START, again, &[]);
    // For longer than until lbd looks the next time, which is every ten seconds.
    let until = Instant::now() + Duration::from_secs(11);
    while Instant::now() < until {
        assert_eq!(fs::read_link(&link).ok(), Some(base.join("own.sock")));
        thread::sleep(Duration::from_millis(50));
    }
    assert!(ask(&base, &["status"]).status.success());
    assert_eq!(daemon.said(Mark::START, again).len(), 1);
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert!(sockets(&base).is_empty() && !base.join("own.sock").exists());
}

#[test]
fn what_killed_daemons_leave_is_cleared_away() {
    let ports = Ports::take(1);
    let service = ports.service(&command(&["http"]));
    let folder = prepare(&service);
    let base = folder.path().to_owned();
    // One that runs, and three that are killed, one with a link.
    let mut others = Vec::new();
    for number in 0..4 {
        let ports = Ports::take(1);
        let own = if number == 1 { "[admin]\nsocket = \"1.sock\"\n" } else { "" };
        let other = tempfile::tempdir().unwrap();
        let file = other.path().join("lb.toml");
        fs::write(&file, format!("{own}{}", ports.service(&command(&["http"])))).unwrap();
        let command = lbd(&base, &["--config", file.to_str().unwrap()]);
        let daemon = Daemon::run(other, command);
        daemon.wait_healthy(Mark::START, 1);
        others.push((daemon, ports));
    }
    for (daemon, _) in &others[1..] {
        kill_hard(daemon.pid());
    }
    eventually("nobody listens there", || {
        sockets(&base).iter().filter(|path| UnixStream::connect(path).is_err()).count() == 3
    });
    assert_eq!(sockets(&base).len(), 4);
    let mut daemon = start(folder, 1);
    assert_eq!(sockets(&base).len(), 2, "{:?}", sockets(&base));
    let alive = others[0].0.path("lb.toml");
    let status = lbd(&base, &["status", "--config", alive.to_str().unwrap()]).output().unwrap();
    assert!(status.status.success(), "{status:?}");
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
}

#[test]
fn who_asks_for_the_wrong_one_is_told_which_run() {
    let ports = Ports::take(1);
    let folder = prepare(&ports.service(&command(&["http"])));
    let daemon = start(folder, 1);
    let base = daemon.folder.path();
    let output = lbd(base, &["status", "--config", "other.toml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    let first =
        format!("lbd: no lbd runs with {}: nothing listens on ", base.join("other.toml").display());
    assert!(said.starts_with(&first) && said.contains("name another by --config"), "{said}");
    let user = nix::unistd::User::from_uid(geteuid()).unwrap().unwrap().name;
    let line = format!(
        "  --config {} (pid {}, user {user}, services web)",
        base.join("lb.toml").display(),
        daemon.pid()
    );
    assert!(said.lines().any(|found| found == line), "{said}\n{line}");
}

/// A copy of `lbd` that everybody can run, and a daemon that another user runs.
fn start_as_nobody(folder: TempDir) -> Daemon {
    let path = folder.path().to_owned();
    for (from, to) in
        [(Path::new(env!("CARGO_BIN_EXE_lbd")), "lbd"), (Path::new(&common::fixture()), "fixture")]
    {
        fs::copy(from, path.join(to)).unwrap();
    }
    let mut command = Command::new(path.join("lbd"));
    command.args(["--config".as_ref(), path.join("lb.toml").as_os_str()]);
    command.env_remove("RUNTIME_DIRECTORY").env_remove("XDG_RUNTIME_DIR");
    command.uid(NOBODY).gid(NOBODY);
    let daemon = Daemon::run(folder, command);
    daemon.wait_healthy(Mark::START, 1);
    daemon
}

#[test]
fn root_finds_the_daemons_of_others() {
    if !needs::is_root() {
        return;
    }
    let ports = Ports::take(1);
    let folder = prepare(&ports.service("command = [\"./fixture\", \"http\"]"));
    let file = folder.path().join("lb.toml");
    let mut daemon = start_as_nobody(folder);
    let base = daemon.folder.path().to_owned();
    let run = |arguments: &[&str]| lbd(&base, arguments).output().unwrap();
    let config = ["--config", file.to_str().unwrap()];
    let status = run(&[&["status"], &config[..]].concat());
    assert!(status.status.success(), "{status:?}");
    let warning = text(&status.stderr);
    assert!(warning.starts_with("lbd: warning: this one is run by user "), "{warning}");
    // Whose file that is not may have started it for others to take it for theirs.
    let stop = run(&[&["stop"], &config[..]].concat());
    assert_eq!(stop.status.code(), Some(1), "{stop:?}");
    let said = text(&stop.stderr);
    let said = said.lines().last().unwrap();
    assert!(said.contains("but one of user 65534, whose file that is not"), "{said}");
    let (_, socket) = said.split_once("--socket ").unwrap();
    assert!(run(&["status", "--socket", socket]).status.success());
    // It is in the list, too.
    let listed = text(&run(&["status", "--config", "other.toml"]).stderr);
    let line = listed.lines().find(|line| line.contains(file.to_str().unwrap())).unwrap();
    assert!(line.contains(&format!("(pid {}, user ", daemon.pid())), "{listed}");
    assert!(line.ends_with(&format!(": --socket {socket}")), "{listed}");
    // His own he may be stopped with.
    chown(&file, Some(NOBODY), Some(NOBODY)).unwrap();
    let stop = run(&[&["stop"], &config[..]].concat());
    assert_eq!(text(&stop.stdout), "stopped\n", "{stop:?}");
    daemon.wait_stopped();
}

#[test]
fn who_finds_his_folder_taken_makes_another_one() {
    if !needs::is_root() {
        return;
    }
    // As a user that nobody is, whose folder somebody else has.
    const SOMEBODY: u32 = 64_999;
    let taken = PathBuf::from(format!("/tmp/lbd-{SOMEBODY}"));
    let _ = fs::remove_dir_all(&taken);
    fs::create_dir(&taken).unwrap();
    chown(&taken, Some(NOBODY), Some(NOBODY)).unwrap();
    let ports = Ports::take(1);
    let folder = prepare(&ports.service("command = [\"./fixture\", \"http\"]"));
    let base = folder.path().to_owned();
    fs::copy(env!("CARGO_BIN_EXE_lbd"), base.join("lbd")).unwrap();
    fs::copy(common::fixture(), base.join("fixture")).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(base.join("lbd"));
        command.args(arguments).args([OsStr::new("--config"), base.join("lb.toml").as_os_str()]);
        command.env_remove("RUNTIME_DIRECTORY").env_remove("XDG_RUNTIME_DIR");
        command.uid(SOMEBODY).gid(SOMEBODY).current_dir("/");
        command
    };
    let mut daemon = Daemon::run(folder, run(&[]));
    daemon.wait_healthy(Mark::START, 1);
    let line = daemon.wait(Mark::START, "the admin socket is not as it should be", &[]);
    assert!(line.raw.contains("it belongs to user 65534"), "{}", line.raw);
    let second = run(&[]).output().unwrap();
    assert!(text(&second.stderr).contains("another lbd already runs"), "{second:?}");
    let stop = run(&["stop"]).output().unwrap();
    assert_eq!(text(&stop.stdout), "stopped\n", "{stop:?}");
    daemon.wait_stopped();
    fs::remove_dir_all(&taken).unwrap();
    let prefix = format!("lbd-{SOMEBODY}.");
    for entry in fs::read_dir("/tmp").unwrap().filter_map(Result::ok) {
        if entry.file_name().as_bytes().starts_with(prefix.as_bytes()) {
            fs::remove_dir(entry.path()).unwrap();
        }
    }
}
