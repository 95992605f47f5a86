//! Workers as the kernel sees them: started, signalled, killed, and what is left of them.

use std::{
    collections::BTreeMap,
    fs,
    future::Future,
    io::{self, Read as _},
    net::TcpListener,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio, id},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use super::TURN;
use lbd::process::{Child, ChildEvent, Exit, Launch, Spawner, Streams};
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::signal::{Signal, kill},
    unistd::{Gid, Pid, Uid, close, getgroups, setgroups},
};
use tokio::{
    sync::MutexGuard,
    time::{Instant, sleep, timeout},
};

/// Longer than anything here takes, however slow the machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// The children of a process are one family, and there is one `Spawner` for it.
async fn spawner() -> (MutexGuard<'static, ()>, Spawner) {
    let turn = TURN.lock().await;
    (turn, Spawner::with_guard(env!("CARGO_BIN_EXE_lbd").into()).unwrap())
}

/// `argv` in the root folder, with an environment of a mark to find its processes by.
fn launch(argv: &[&str]) -> (Launch<'static>, String) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mark = format!("{}-{}", id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let null = || fs::File::options().write(true).open("/dev/null").unwrap();
    let launch = Launch {
        label: "test/1".to_owned(),
        program: None,
        argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
        env: vec![
            ("PATH".into(), std::env::var_os("PATH").unwrap()),
            ("LBD_TEST_MARK".into(), mark.clone().into()),
        ],
        directory: "/".into(),
        listeners: Vec::new(),
        streams: Streams::new(null(), null()),
        umask: None,
        user: None,
        group: None,
        open_files: None,
        cgroup: None,
    };
    (launch, mark)
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(DEADLINE, what).await.expect("did not happen in time")
}

async fn started(child: &mut Child) -> i32 {
    match soon(child.next()).await {
        Some(ChildEvent::Started { pid }) => pid,
        other => panic!("not started: {other:?}"),
    }
}

/// The events from here on.
async fn rest(child: &mut Child) -> Vec<ChildEvent> {
    let mut events = Vec::new();
    while let Some(event) = soon(child.next()).await {
        events.push(event);
    }
    events
}

fn ended(exit: Exit) -> Vec<ChildEvent> {
    vec![ChildEvent::Exited(exit), ChildEvent::Gone]
}

/// The events and the standard output of `launch`.
async fn run(spawner: &Spawner, mut launch: Launch<'_>) -> (Vec<ChildEvent>, String) {
    let (mut read, write) = io::pipe().unwrap();
    launch.streams = Streams::new(write.try_clone().unwrap(), write);
    let mut child = spawner.spawn(launch).unwrap();
    let events = rest(&mut child).await;
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    (events, text)
}

/// The live processes with this mark in their environment.
fn marked(mark: &str) -> Vec<i32> {
    let mark = format!("LBD_TEST_MARK={mark}");
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environ.split(|&byte| byte == 0).any(|variable| variable == mark.as_bytes())
        })
        .collect()
}

async fn until(what: impl Fn() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !what() {
        assert!(Instant::now() < end, "did not happen in time");
        sleep(Duration::from_millis(5)).await;
    }
}

/// `/proc/PID/status`, by field.
fn status(pid: i32) -> BTreeMap<String, String> {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .unwrap()
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

/// The descriptors of a process, and what they are open to.
fn descriptors(pid: i32) -> Vec<(String, PathBuf)> {
    let mut all: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter_map(|entry| {
            Some((entry.file_name().into_string().ok()?, fs::read_link(entry.path()).ok()?))
        })
        .collect();
    all.sort();
    all
}

fn script(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Ignores TERM, and has a child, a grandchild in a session of its own, and a daemon (double fork).
const STUBBORN: &str = "
    trap '' TERM HUP
    sleep 1000 &
    setsid sh -c 'sleep 1000 & sleep 1000 & wait' &
    (setsid sh -c '(sleep 1000 &) ; sleep 1000 & wait' &)
    wait";

/// How many processes [`STUBBORN`] is, itself included.
const STUBBORN_ONES: usize = 8;

#[tokio::test]
async fn the_end_of_a_program_is_told_by_code_and_by_signal() {
    let (_turn, spawner) = spawner().await;
    for (code, exit) in [
        ("exit 0", Exit::Code(0)),
        ("exit 3", Exit::Code(3)),
        ("kill -KILL $$", Exit::Signal(9)),
        ("kill -40 $$", Exit::Signal(40)),
    ] {
        let mut child = spawner.spawn(launch(&["sh", "-c", code]).0).unwrap();
        started(&mut child).await;
        assert_eq!(rest(&mut child).await, ended(exit), "{code}");
    }
}

#[tokio::test]
async fn a_program_that_cannot_run_is_told_in_one_sentence() {
    let (_turn, spawner) = spawner().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let name = |file: &str| path.join(file).display().to_string();
    script(path, "fine", "#!/bin/sh\n");
    script(path, "bad-interpreter", "#! /bin/nosuch -x\n");
    script(path, "from-windows", "#!/bin/sh\r\n");
    script(path, "no-program", "echo hello\n");
    fs::write(path.join("plain"), "#!/bin/sh\n").unwrap();
    fs::create_dir(path.join("folder")).unwrap();

    let sentence = async |argv: &[&str], change: &dyn Fn(&mut Launch<'_>)| {
        let (mut launch, _) = launch(argv);
        launch.directory = path.to_owned();
        change(&mut launch);
        let mut child = spawner.spawn(launch).unwrap();
        let events = rest(&mut child).await;
        match events.as_slice() {
            [ChildEvent::Failed(reason), ChildEvent::Gone] => reason.clone(),
            other => panic!("{argv:?} ran: {other:?}"),
        }
    };
    let plain = |_: &mut Launch<'_>| {};
    let small_path = |launch: &mut Launch<'_>| launch.env = vec![("PATH".into(), "/nosuch".into())];
    let in_path =
        |launch: &mut Launch<'_>| launch.env = vec![("PATH".into(), path.as_os_str().into())];
    let no_folder = |launch: &mut Launch<'_>| launch.directory = "/nosuch".into();
    let no_user = |launch: &mut Launch<'_>| launch.user = Some("no such user".to_owned());
    let no_id = |launch: &mut Launch<'_>| launch.user = Some("4294967295".to_owned());
    let no_gid = |launch: &mut Launch<'_>| launch.group = Some("4294967295".to_owned());
    let signed = |launch: &mut Launch<'_>| launch.user = Some("+0".to_owned());
    let no_group = |launch: &mut Launch<'_>| launch.group = Some("no such group".to_owned());
    let nul = |launch: &mut Launch<'_>| launch.argv.push("\0".to_owned());

    for (found, expected) in [
        (
            sentence(&["nodee"], &small_path).await,
            "cannot run \"nodee\": no such program in PATH (/nosuch)".to_owned(),
        ),
        (
            sentence(&["./nosuch"], &plain).await,
            format!("cannot run \"./nosuch\": no such file, seen from the folder {path:?}"),
        ),
        (
            sentence(&["./bad-interpreter"], &plain).await,
            "cannot run \"./bad-interpreter\": its interpreter \"/bin/nosuch\" does not exist"
                .to_owned(),
        ),
        (
            sentence(&["bad-interpreter"], &in_path).await,
            format!(
                "cannot run {:?}: its interpreter \"/bin/nosuch\" does not exist",
                name("bad-interpreter")
            ),
        ),
        (
            sentence(&["./from-windows"], &plain).await,
            "cannot run \"./from-windows\": its interpreter \"/bin/sh\\r\" does not exist"
                .to_owned(),
        ),
        (
            sentence(&["./no-program"], &plain).await,
            "cannot run \"./no-program\": neither a program for this machine nor a script that \
             begins with #!"
                .to_owned(),
        ),
        (
            sentence(&["plain"], &in_path).await,
            format!("cannot run {:?}: it is not executable: permission denied", name("plain")),
        ),
        (
            sentence(&["./folder"], &plain).await,
            "cannot run \"./folder\": it is a folder".to_owned(),
        ),
        (
            sentence(&["./fine"], &no_folder).await,
            "cannot change to the folder \"/nosuch\": no such file or directory".to_owned(),
        ),
        (sentence(&["./fine"], &no_user).await, "unknown user \"no such user\"".to_owned()),
        (sentence(&["./fine"], &no_id).await, "unknown user \"4294967295\"".to_owned()),
        (sentence(&["./fine"], &no_gid).await, "unknown group \"4294967295\"".to_owned()),
        (sentence(&["./fine"], &signed).await, "unknown user \"+0\"".to_owned()),
        (sentence(&["./fine"], &no_group).await, "unknown group \"no such group\"".to_owned()),
        (
            sentence(&["./fine"], &nul).await,
            "cannot pass a NUL byte in an argument or a variable: nul byte found in provided data \
             at position: 0"
                .to_owned(),
        ),
    ] {
        assert_eq!(found, expected);
    }
}

#[tokio::test]
async fn a_worker_sees_its_own_things_and_nothing_else() {
    let (_turn, spawner) = spawner().await;
    // As a shell would pass one on: not close-on-exec.
    let leak = fcntl(io::stdin(), FcntlArg::F_DUPFD(50)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (mut launch, mark) = launch(&["sleep", "1000"]);
    launch.listeners.push((listener.as_fd(), "web".to_owned()));
    launch.umask = Some(0o27);
    launch.open_files = Some((100, 200));
    let mut child = spawner.spawn(launch).unwrap();
    let pid = started(&mut child).await;
    close(leak).unwrap();

    let own = fs::metadata(format!("/proc/self/fd/{}", listener.as_raw_fd())).unwrap();
    let socket = format!("socket:[{}]", own.ino());
    let expected = [("0", "/dev/null"), ("1", "/dev/null"), ("2", "/dev/null"), ("3", &socket)];
    let expected = expected.map(|(number, file)| (number.to_owned(), PathBuf::from(file)));
    // It runs, but it may still be opening its libraries.
    until(|| descriptors(pid) == expected).await;
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/3")).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
    let flags = i32::from_str_radix(flags, 8).unwrap();
    assert_eq!(flags & nix::libc::O_NONBLOCK, 0, "the socket is not blocking");

    let status = status(pid);
    for set in ["SigBlk", "SigIgn", "SigCgt", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(status["Umask"], "0027");
    assert_eq!(status["PPid"], child.guard_pid().to_string());
    // "N (sleep) S", parent, process group, session.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.split(' ').collect();
    assert_eq!(fields[4..6], [pid.to_string(), pid.to_string()]);
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(limit.split_ascii_whitespace().skip(3).collect::<Vec<_>>(), ["100", "200", "files"]);

    let environ = fs::read(format!("/proc/{pid}/environ")).unwrap();
    let variables: Vec<&str> =
        str::from_utf8(&environ).unwrap().split_terminator('\0').skip(1).collect();
    assert_eq!(
        variables,
        [
            &format!("LBD_TEST_MARK={mark}"),
            "LISTEN_FDS=1",
            "LISTEN_FDNAMES=web",
            &format!("LISTEN_PID={pid}"),
        ]
    );

    child.controller().kill();
    assert_eq!(rest(&mut child).await, ended(Exit::Signal(9)));
}

#[tokio::test]
async fn a_guard_holds_neither_the_output_nor_the_sockets_of_its_program() {
    let (_turn, spawner) = spawner().await;
    let (mut output, write) = io::pipe().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (mut launch, _) = launch(&["sh", "-c", "exec >&- 2>&- 3>&-; exec sleep 1000"]);
    launch.listeners.push((listener.as_fd(), "web".to_owned()));
    launch.streams = Streams::new(write.try_clone().unwrap(), write);
    let mut child = spawner.spawn(launch).unwrap();
    started(&mut child).await;
    drop(listener);

    // The program closed its own copies: none is left.
    let end = tokio::task::spawn_blocking(move || output.read(&mut [0]).unwrap());
    assert_eq!(soon(end).await.unwrap(), 0);
    until(|| TcpListener::bind(address).is_ok()).await;

    child.controller().kill();
    assert_eq!(rest(&mut child).await, ended(Exit::Signal(9)));
}

#[tokio::test]
async fn a_guard_is_blind_to_signals_that_are_for_lbd() {
    let (_turn, spawner) = spawner().await;
    let mut child = spawner.spawn(launch(&["sleep", "1000"]).0).unwrap();
    let pid = started(&mut child).await;
    let guard = child.guard_pid();
    assert_eq!(fs::read_to_string(format!("/proc/{guard}/comm")).unwrap(), "lbd-guard\n");
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        kill(Pid::from_raw(guard), signal).unwrap();
    }
    kill(Pid::from_raw(pid), Signal::SIGUSR1).unwrap();
    assert_eq!(rest(&mut child).await, ended(Exit::Signal(Signal::SIGUSR1 as i32)));
}

/// The running process that guards are forked from.
fn template() -> Option<i32> {
    let pids = fs::read_dir("/proc").unwrap();
    let mut pids = pids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.find(|pid| {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let is = |line: &str| text.lines().any(|other| other == line);
        is("Name:\tlbd-template") && is(&format!("PPid:\t{}", id())) && !text.contains("State:\tZ")
    })
}

#[tokio::test]
async fn workers_start_whatever_has_become_of_the_template() {
    let (_turn, spawner) = spawner().await;
    let mut children = Vec::new();
    for signal in [None, Some(Signal::SIGSTOP), Some(Signal::SIGKILL)] {
        if let Some(signal) = signal {
            kill(Pid::from_raw(template().unwrap()), signal).unwrap();
        }
        let mut child = spawner.spawn(launch(&["sleep", "1000"]).0).unwrap();
        started(&mut child).await;
        children.push(child);
    }
    for child in &children {
        let guard = child.guard_pid();
        assert_eq!(status(guard)["PPid"], id().to_string());
        let shown = fs::read_to_string(format!("/proc/{guard}/cmdline")).unwrap();
        assert_eq!(shown, "lbd exec test/1\0");
    }
    for mut child in children {
        child.controller().kill();
        assert_eq!(rest(&mut child).await, ended(Exit::Signal(9)));
    }
    drop(spawner);
    assert_eq!(template(), None);
}

#[tokio::test]
async fn guards_share_what_the_template_has_set_up() {
    let (_turn, spawner) = spawner().await;
    let mut child = spawner.spawn(launch(&["sleep", "1000"]).0).unwrap();
    started(&mut child).await;
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", child.guard_pid()));
    // Root alone may look.
    if let Ok(rollup) = rollup {
        // What it has written to; of the binary it alone may be the one that has read a page.
        let own = rollup.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).unwrap();
        let kib: u32 = own.trim().strip_suffix(" kB").unwrap().parse().unwrap();
        assert!((1..150).contains(&kib), "{kib} KiB");
    }
    child.controller().kill();
    assert_eq!(rest(&mut child).await, ended(Exit::Signal(9)));
}

#[tokio::test]
async fn folder_and_path_are_the_workers_own() {
    let (_turn, spawner) = spawner().await;
    let folder = tempfile::tempdir().unwrap();
    script(folder.path(), "tool", "#!/bin/sh\necho \"$0\" \"$PWD\"\n");
    let own = folder.path().canonicalize().unwrap();
    for (program, path) in [("./tool", "/usr/bin:/bin"), ("tool", own.to_str().unwrap())] {
        let (mut launch, _) = launch(&[program]);
        launch.directory.clone_from(&own);
        launch.env = vec![("PATH".into(), path.into())];
        let (_, text) = run(&spawner, launch).await;
        let name = if program == "tool" { own.join("tool") } else { program.into() };
        assert_eq!(text, format!("{} {}\n", name.display(), own.display()));
    }
    let (mut launch, _) = launch(&["called", "-c", "echo $0 $1", "so", "far"]);
    launch.program = Some("/bin/sh".into());
    assert_eq!(run(&spawner, launch).await.1, "so far\n");
}

#[tokio::test]
async fn another_user_comes_with_its_group_and_no_way_back() {
    if !Uid::effective().is_root() {
        println!("skipped: only root may change the user");
        return;
    }
    let (_turn, spawner) = spawner().await;
    let (mut launch, _) = launch(&["sleep", "1000"]);
    launch.user = Some("64321".to_owned());
    launch.group = Some("64322".to_owned());
    let own = getgroups().unwrap();
    setgroups(&[Gid::from_raw(64399)]).unwrap();
    let mut child = spawner.spawn(launch).unwrap();
    let status = status(started(&mut child).await);
    setgroups(&own).unwrap();
    assert_eq!(status["Uid"], "64321\t64321\t64321\t64321");
    assert_eq!(status["Gid"], "64322\t64322\t64322\t64322");
    assert_eq!(status["Groups"], "");
    assert_eq!(status["NoNewPrivs"], "1");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    // The change of user clears the death signal: it must have been set again. (lbd, which would
    // kill it too, does not look before it is asked.)
    kill(Pid::from_raw(child.guard_pid()), Signal::SIGKILL).unwrap();
    let pid: i32 = status["Pid"].parse().unwrap();
    until(|| self::status(pid)["State"].starts_with('Z')).await;
    assert_eq!(rest(&mut child).await, ended(Exit::Lost));
    assert!(!Path::new(&format!("/proc/{}", status["Pid"])).exists());
}

#[tokio::test]
async fn a_user_by_name_brings_home_and_primary_group() {
    if !Uid::effective().is_root() {
        println!("skipped: only root may change the user");
        return;
    }
    let Ok(Some(nobody)) = nix::unistd::User::from_name("nobody") else {
        println!("skipped: there is no user `nobody` here");
        return;
    };
    let (_turn, spawner) = spawner().await;
    let (mut launch, _) = launch(&["sh", "-c", "id -u; id -g; echo $HOME $USER"]);
    launch.user = Some("nobody".to_owned());
    launch.env.push(("HOME".into(), "/mine".into()));
    let (_, text) = run(&spawner, launch).await;
    assert_eq!(text, format!("{}\n{}\n/mine nobody\n", nobody.uid, nobody.gid));

    let (mut launch, _) = self::launch(&["true"]);
    launch.user = Some("64321".to_owned());
    let (events, _) = run(&spawner, launch).await;
    let reason = "user \"64321\" is in no user database: its group must be given too".to_owned();
    assert_eq!(events, [ChildEvent::Failed(reason), ChildEvent::Gone]);
}

#[tokio::test]
async fn a_signal_reaches_the_group_however_early_and_a_stopped_one_too() {
    let (_turn, spawner) = spawner().await;
    let mut child = spawner.spawn(launch(&["sleep", "1000"]).0).unwrap();
    child.controller().signal(Signal::SIGTERM);
    started(&mut child).await;
    assert_eq!(rest(&mut child).await, ended(Exit::Signal(15)));

    let (launch, mark) = launch(&["sh", "-c", "trap 'exit 5' TERM; sleep 1000 & wait"]);
    let mut child = spawner.spawn(launch).unwrap();
    let pid = started(&mut child).await;
    until(|| marked(&mark).len() == 2).await;
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    child.controller().signal(Signal::SIGTERM);
    assert_eq!(rest(&mut child).await, ended(Exit::Code(5)));

    // After its end, a controller does nothing.
    let controller = child.controller();
    controller.kill();
    drop(child);
    controller.signal(Signal::SIGTERM);
}

#[tokio::test]
async fn a_kill_leaves_nothing_of_a_stubborn_tree() {
    let (_turn, spawner) = spawner().await;
    let (launch, mark) = launch(&["sh", "-c", STUBBORN]);
    let mut child = spawner.spawn(launch).unwrap();
    started(&mut child).await;
    until(|| marked(&mark).len() == STUBBORN_ONES).await;
    // The first is ignored; the guard must do the second even if somebody stopped it.
    child.controller().signal(Signal::SIGHUP);
    kill(Pid::from_raw(child.guard_pid()), Signal::SIGSTOP).unwrap();
    child.controller().kill();
    assert_eq!(rest(&mut child).await, ended(Exit::Signal(9)));
    assert_eq!(marked(&mark), [0; 0]);
}

#[tokio::test]
async fn what_a_program_leaves_behind_ends_with_it() {
    let (_turn, spawner) = spawner().await;
    let (launch, mark) = launch(&["sh", "-c", &format!("({STUBBORN}) & read line; exit 4")]);
    // `read` fails at once on /dev/null: some of the tree may not even have begun.
    let mut child = spawner.spawn(launch).unwrap();
    started(&mut child).await;
    assert_eq!(rest(&mut child).await, ended(Exit::Code(4)));
    assert_eq!(marked(&mark), [0; 0]);
}

#[tokio::test]
async fn one_that_flees_from_session_to_session_is_caught() {
    let (_turn, spawner) = spawner().await;
    let folder = tempfile::tempdir().unwrap();
    let runner = script(folder.path(), "runner", "#!/bin/sh\nsetsid \"$0\" &\n");
    let (launch, mark) = launch(&["sh", "-c", "\"$0\"; exit 0", runner.to_str().unwrap()]);
    let mut child = spawner.spawn(launch).unwrap();
    started(&mut child).await;
    assert_eq!(rest(&mut child).await, ended(Exit::Code(0)));
    assert_eq!(marked(&mark), [0; 0]);
}

#[tokio::test]
async fn a_killed_guard_takes_the_whole_tree_with_it() {
    let (_turn, spawner) = spawner().await;
    let (other, other_mark) = launch(&["sleep", "1000"]);
    let mut other = spawner.spawn(other).unwrap();
    started(&mut other).await;

    let (launch, mark) = launch(&["sh", "-c", STUBBORN]);
    let mut child = spawner.spawn(launch).unwrap();
    started(&mut child).await;
    until(|| marked(&mark).len() == STUBBORN_ONES).await;
    kill(Pid::from_raw(child.guard_pid()), Signal::SIGKILL).unwrap();
    assert_eq!(rest(&mut child).await, ended(Exit::Lost));
    assert_eq!(marked(&mark), [0; 0]);

    // And nobody else's.
    assert_eq!(marked(&other_mark).len(), 1);
    other.controller().kill();
    assert_eq!(rest(&mut other).await, ended(Exit::Signal(9)));
}

#[tokio::test]
async fn a_child_that_was_there_before_lbd_is_spared_and_reaped() {
    let turn = TURN.lock().await;
    #[expect(clippy::zombie_processes, reason = "reaped by its pid, as a child of others is")]
    let before = Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().unwrap();
    let before = i32::try_from(before.id()).unwrap();
    let spawner = Spawner::with_guard(env!("CARGO_BIN_EXE_lbd").into()).unwrap();
    let mut child = spawner.spawn(launch(&["sleep", "1000"]).0).unwrap();
    started(&mut child).await;
    kill(Pid::from_raw(child.guard_pid()), Signal::SIGKILL).unwrap();
    assert_eq!(rest(&mut child).await, ended(Exit::Lost));

    let there = || Path::new(&format!("/proc/{before}")).exists();
    assert_eq!(status(before)["State"], "S (sleeping)");
    kill(Pid::from_raw(before), Signal::SIGKILL).unwrap();
    until(|| status(before)["State"].starts_with('Z')).await;
    spawner.reap();
    assert!(!there());
    drop(turn);
}

#[tokio::test]
async fn the_end_of_lbd_is_the_end_of_the_tree() {
    let (_turn, spawner) = spawner().await;
    let (launch, mark) = launch(&["sh", "-c", STUBBORN]);
    let mut child = spawner.spawn(launch).unwrap();
    started(&mut child).await;
    until(|| marked(&mark).len() == STUBBORN_ONES).await;
    let guard = child.guard_pid();
    // What a guard sees of the end of lbd: nobody holds the other end of its channel.
    drop(child);
    until(|| marked(&mark).is_empty()).await;
    until(|| fs::read_to_string(format!("/proc/{guard}/status")).is_err()).await;
}

#[test]
fn the_hidden_command_refuses_to_be_run_by_hand() {
    let _turn = TURN.blocking_lock();
    let output = Command::new(env!("CARGO_BIN_EXE_lbd"))
        .args(["exec", "web/1"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "lbd exec is how lbd starts a worker, and of no use by hand\n"
    );
}
