//! `output = FILE`: opened as the worker's user, opened anew on SIGUSR1, and nothing of it is lost.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use crate::common::{
    Daemon, Mark, Ports, command, eventually, freeze, kill_hard, named, needs,
    proc::{children, is_alive, parent, threads},
    stays, thaw,
};
use nix::{
    sys::{
        signal::Signal::{SIGTERM, SIGUSR1},
        stat::Mode,
    },
    unistd::{User, mkfifo},
};
use tempfile::TempDir;

/// A worker of a shell, which writes what `script` says and then does nothing.
fn shell(script: &str) -> String {
    format!(
        "command = [\"sh\", \"-c\", {:?}]\nsocket = \"inherit\"",
        format!("{script}; exec sleep 1000")
    )
}

/// More than a pipe holds, once there is a file `go`; then there is a file `said`.
const MUCH: &str = "while ! [ -e go ]; do sleep 0.01; done; seq 100000; touch said";

/// Waits until all that [`MUCH`] says is in the file, and nothing else.
fn wait_for_much(daemon: &Daemon) {
    let expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    eventually("all of it is there", || text(&daemon.path("file")).len() == expected.len());
    assert!(text(&daemon.path("file")) == expected);
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The process that writes the file of the worker in the first slot.
fn writer(daemon: &Daemon) -> i32 {
    let guard = parent(daemon.slot_pids()[0]).unwrap();
    let name = |pid: &i32| threads(*pid)[0].1 == "lbd-output";
    children(guard).into_iter().find(name).unwrap()
}

/// A folder that `nobody` may write to, in one that it may not; and the keys to run as that user. None
/// where this is not root.
fn as_nobody() -> Option<(TempDir, String)> {
    if !needs::is_root() {
        return None;
    }
    let nobody = User::from_name("nobody").unwrap().expect("there is a user nobody");
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let own = folder.path().join("own");
    fs::create_dir(&own).unwrap();
    std::os::unix::fs::chown(&own, Some(nobody.uid.as_raw()), Some(nobody.gid.as_raw())).unwrap();
    Some((folder, "user = \"nobody\"".to_owned()))
}

#[test]
fn each_worker_has_a_file_by_its_name_and_goes_on_in_a_new_one() {
    let ports = Ports::take(2);
    let script = "echo begins $LBD_SLOT; while sleep 0.01; do echo $LBD_SLOT; echo err >&2; done";
    let keys = format!("{}\noutput = \"out/{{service}}-{{slot}}.log\"", shell(script));
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("out")).unwrap();
    let mut daemon = Daemon::start_in(folder, &ports.service(&keys));
    daemon.wait_many(Mark::START, "worker started", &[], 2);
    let pids = daemon.slot_pids();
    for slot in 0..2 {
        let path = daemon.path(&format!("out/web-{slot}.log"));
        let begins = format!("begins {slot}\n");
        eventually("it is written to", || {
            let text = text(&path);
            text.starts_with(&begins) && text.contains(&format!("\n{slot}\nerr\n"))
        });
        fs::rename(&path, daemon.path(&format!("out/{slot}.old"))).unwrap();
    }
    daemon.signal(SIGUSR1);
    for slot in 0..2 {
        let path = daemon.path(&format!("out/web-{slot}.log"));
        eventually("it goes on in a new one", || text(&path).lines().count() > 4);
        let (old, new) = (text(&daemon.path(&format!("out/{slot}.old"))), text(&path));
        assert!(old.ends_with('\n') && !new.contains("begins"), "{old:?} {new:?}");
    }
    assert_eq!(daemon.slot_pids(), pids, "the same workers");
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert!(daemon.said(Mark::START, "output not written").is_empty());
}

#[test]
fn the_bytes_are_as_they_were_written_up_to_the_last() {
    let ports = Ports::take(1);
    // No line break at the end, and bytes that are no text.
    let script =
        "printf 'a\\000\\377\\r\\n\\nb'; head -c 3000000 /dev/zero; printf end >&2; exit 3";
    let keys = format!(
        "command = [\"sh\", \"-c\", {script:?}]\noutput = \"./file\"\nrestart.min-delay = \"100s\"\n\
         restart.max-delay = \"100s\""
    );
    let daemon = Daemon::start(&ports.service(&keys));
    daemon.wait(Mark::START, "worker exited", &[("status", "exit status 3")]);
    let expected = [&b"a\0\xff\r\n\nb"[..], &vec![0; 3_000_000], b"end"].concat();
    eventually("all of it is there", || {
        fs::metadata(daemon.path("file")).is_ok_and(|file| file.len() == expected.len() as u64)
    });
    assert!(fs::read(daemon.path("file")).unwrap() == expected);
    eventually("nobody writes any more", || daemon.processes() == [daemon.pid()]);
}

#[test]
fn two_workers_with_one_file_have_whole_lines_in_it() {
    let ports = Ports::take(2);
    let line = "x".repeat(1000);
    let script = format!("yes $LBD_SLOT-{line} | head -n 3000");
    let keys = format!("{}\noutput = \"./file\"", shell(&script));
    let daemon = Daemon::start(&ports.service(&keys));
    eventually("all of it is there", || text(&daemon.path("file")).lines().count() >= 6000);
    let text = text(&daemon.path("file"));
    for slot in 0..2 {
        let line = format!("{slot}-{line}");
        assert_eq!(text.lines().filter(|found| *found == line).count(), 3000);
    }
}

#[test]
fn a_worker_waits_while_nobody_writes_what_it_says() {
    let ports = Ports::take(1);
    let keys = format!("{}\noutput = \"./file\"", shell(MUCH));
    let daemon = Daemon::start(&ports.service(&keys));
    daemon.wait(Mark::START, "worker started", &[]);
    let writer = writer(&daemon);
    freeze(writer);
    fs::write(daemon.path("go"), "").unwrap();
    let taken = "no more than a pipe holds is taken";
    stays(taken, Duration::from_millis(300), || !daemon.path("said").exists());
    thaw(writer);
    eventually("it has said all", || daemon.path("said").exists());
    wait_for_much(&daemon);
}

#[test]
fn a_full_disk_is_told_and_costs_nothing_when_there_is_room_again() {
    let ports = Ports::take(1);
    let keys = format!("{}\noutput = \"./file\"", shell(MUCH));
    let daemon = Daemon::start(&ports.service(&keys));
    daemon.wait(Mark::START, "worker started", &[]);
    let limit = |limit: &str| {
        // As a full disk, to this process alone.
        let limit = format!("--fsize={limit}:unlimited");
        let pid = writer(&daemon).to_string();
        let done = Command::new("prlimit").args(["--pid", &pid, &limit]).status().unwrap();
        assert!(done.success());
    };
    limit("10000");
    fs::write(daemon.path("go"), "").unwrap();
    let line = daemon.wait(Mark::START, "output not written", &[("service", "web")]);
    let path = daemon.path("file").display().to_string();
    assert!(line.get("error").unwrap().contains(&path), "{}", line.raw);
    assert_eq!(line.get("slot"), Some("0"));
    assert!(!daemon.path("said").exists());
    limit("unlimited");
    wait_for_much(&daemon);
}

#[test]
fn what_was_written_before_lbd_was_killed_is_in_the_file() {
    let ports = Ports::take(1);
    let script = "i=0; while i=$((i + 1)); do echo $i; echo $i > new; mv new count; done";
    let keys = format!("{}\noutput = \"./file\"", shell(script));
    let daemon = Daemon::start(&ports.service(&keys));
    daemon.wait(Mark::START, "worker started", &[]);
    let writer = writer(&daemon);
    let count = || text(&daemon.path("count")).trim().parse::<usize>().unwrap_or(0);
    eventually("it writes", || count() > 10);
    // What it says from here on is in the pipe when lbd dies.
    freeze(writer);
    let before = count();
    eventually("it writes", || count() > before + 10);
    let worker = daemon.slot_pids()[0];
    kill_hard(daemon.pid());
    eventually("the worker has ended", || !is_alive(worker));
    thaw(writer);
    eventually("nothing is left", || daemon.processes().is_empty());
    let last = text(&daemon.path("file")).lines().last().unwrap().parse::<usize>().unwrap();
    assert!(last >= count(), "{last} of {}", count());
}

#[test]
fn what_is_no_regular_file_is_an_error_of_that_worker_alone() {
    let (web, other) = (Ports::take(1), Ports::take(1));
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    mkfifo(&at("fifo"), Mode::S_IRWXU).unwrap();
    symlink("target", at("link")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    let mut config = named("other", &other.service(&command(&["http"])));
    let ports: Vec<_> = (0..5).map(|_| Ports::take(1)).collect();
    let cases = [
        ("fifo", "it is not a regular file; expected one, or nothing"),
        ("link", "it is a symbolic link, and none is followed; name the file itself"),
        ("folder", "is a directory"),
        ("nowhere/file", "no such file or directory"),
        ("/dev/null", "it is not a regular file; expected one, or nothing"),
    ];
    for ((name, (path, _)), ports) in ["a", "b", "c", "d", "e"].iter().zip(cases).zip(&ports) {
        let path = if path.starts_with('/') { path.to_owned() } else { format!("./{path}") };
        let keys = format!("{}\noutput = \"{path}\"", command(&["http"]));
        config += &named(name, &ports.service(&keys));
    }
    config += &web.service(&command(&["http"]));
    let mut daemon = Daemon::start_in(folder, &config);
    daemon.wait_healthy(Mark::START, 2);
    for (name, (path, why)) in ["a", "b", "c", "d", "e"].iter().zip(cases) {
        let line = daemon.wait(Mark::START, "worker not started", &[("service", name)]);
        let path = daemon.folder.path().canonicalize().unwrap().join(path);
        let expected = format!("cannot open its output {path:?}: {why}");
        assert_eq!(line.get("error"), Some(&*expected));
    }
    assert!(!daemon.path("target").exists(), "the link was followed");
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
}

#[test]
fn a_worker_that_puts_a_fifo_in_the_place_of_its_file_holds_up_nobody() {
    let Some((folder, user)) = as_nobody() else { return };
    let (web, other) = (Ports::take(1), Ports::take(1));
    let script = "echo one; while ! [ -s own/out ]; do :; done; rm own/out; mkfifo own/out; exit 1";
    let keys =
        format!("{}\n{user}\noutput = \"own/out\"\nrestart.max-delay = \"100ms\"", shell(script));
    let config =
        format!("{}{}", web.service(&keys), named("other", &other.service(&command(&["http"]))));
    let mut daemon = Daemon::start_in(folder, &config);
    daemon.wait_many(Mark::START, "worker not started", &[("service", "web")], 3);
    let line = daemon.wait(Mark::START, "worker not started", &[]);
    assert!(line.get("error").unwrap().contains("own/out"), "{}", line.raw);
    // lbd supervises on: the other service, and its own end.
    let since = daemon.now();
    let pid = daemon.workers("other")[0]["pid"].as_i64().unwrap();
    kill_hard(pid.try_into().unwrap());
    daemon.wait(since, "worker healthy", &[("service", "other")]);
    // It comes and goes as it likes: the next file is opened anew, too.
    daemon.signal(SIGUSR1);
    let begun = Instant::now();
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn a_file_is_made_by_the_workers_user_and_where_that_may() {
    let Some((folder, user)) = as_nobody() else { return };
    let nobody = User::from_name("nobody").unwrap().unwrap().uid.as_raw();
    // A worker may put a link in the place of its file, or of its folder.
    let secret = folder.path().join("secret");
    fs::write(&secret, "root's\n").unwrap();
    fs::create_dir(folder.path().join("roots")).unwrap();
    symlink(&secret, folder.path().join("own/link")).unwrap();
    symlink("../roots", folder.path().join("own/folder")).unwrap();
    let ports: Vec<_> = (0..4).map(|_| Ports::take(1)).collect();
    let service = |name: &str, ports: &Ports, path: &str| {
        let keys = format!("{}\n{user}\numask = \"027\"\noutput = \"{path}\"", shell("echo mine"));
        named(name, &ports.service(&keys))
    };
    let config = [
        service("good", &ports[0], "own/out"),
        service("link", &ports[1], "own/link"),
        service("folder", &ports[2], "own/folder/out"),
        service("roots", &ports[3], "./secret"),
    ];
    let mut daemon = Daemon::start_in(folder, &config.concat());
    daemon.wait(Mark::START, "worker started", &[("service", "good")]);
    let path = daemon.path("own/out");
    eventually("it is written", || text(&path) == "mine\n");
    let file = fs::metadata(&path).unwrap();
    assert_eq!((file.uid(), file.mode() & 0o777), (nobody, 0o640));
    let error = |service: &str| {
        let line = daemon.wait(Mark::START, "worker not started", &[("service", service)]);
        line.get("error").unwrap().to_owned()
    };
    assert!(error("link").contains("own/link\": it is a symbolic link"), "{}", error("link"));
    let denied = "out\" as the user \"nobody\": permission denied";
    assert!(error("folder").contains(denied), "{}", error("folder"));
    assert!(error("roots").contains("secret\" as the user \"nobody\": permission denied"));
    assert_eq!(text(&daemon.path("secret")), "root's\n");
    assert!(!daemon.path("roots/out").exists());
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
}

#[test]
fn a_worker_of_another_user_can_open_its_streams_by_name() {
    let Some((folder, user)) = as_nobody() else { return };
    let ports: Vec<_> = (0..2).map(|_| Ports::take(1)).collect();
    let keys = shell("echo to stdout > /dev/stdout; echo to stderr > /dev/stderr");
    let config = format!(
        "{}{}",
        named("log", &ports[0].service(&format!("{keys}\n{user}"))),
        named("file", &ports[1].service(&format!("{keys}\n{user}\noutput = \"own/out\""))),
    );
    let mut daemon = Daemon::start_in(folder, &config);
    let fields = |stream: &'static str, line: &'static str| [("stream", stream), ("line", line)];
    daemon.wait(Mark::START, "output", &fields("stdout", "to stdout"));
    daemon.wait(Mark::START, "output", &fields("stderr", "to stderr"));
    eventually("it is written", || text(&daemon.path("own/out")) == "to stdout\nto stderr\n");
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
}
