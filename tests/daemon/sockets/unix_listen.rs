//! `listen` on a unix socket: who may connect to it, and what another user can do who owns its folder.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::Signal,
    unistd::{Gid, Uid, geteuid, setfsgid, setfsuid},
};
use tempfile::TempDir;

use crate::common::{Daemon, Mark, Ports, SetAtEnd, command, lbd, needs};

/// Any other local user.
const OTHER: u32 = 65534;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn owner(path: &Path) -> (u32, u32) {
    let file = fs::symlink_metadata(path).unwrap();
    (file.uid(), file.gid())
}

/// Asks the service behind the socket at `path` for an answer.
fn served(path: &Path) -> bool {
    let Ok(mut client) = UnixStream::connect(path) else { return false };
    client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer.starts_with("HTTP/1.1 200")
}

fn service(ports: &Ports, listen: &str) -> String {
    format!("[service.web]\nlisten = {listen}\nports = {:?}\n{}\n", ports.all(), command(&["http"]))
}

#[test]
fn a_table_says_who_may_connect_and_a_reload_changes_it_in_place() {
    let ports = Ports::take(1);
    let with = |keys: &str| service(&ports, &format!("[{{ unix = \"web.sock\"{keys} }}]"));
    let daemon = Daemon::healthy(&with(", mode = \"640\""), 1);
    let path = daemon.path("web.sock");
    let made = fs::metadata(&path).unwrap().ino();
    assert_eq!(mode(&path), 0o640);
    assert!(served(&path));
    let pids = daemon.pids(&ports);

    // One that is connected, and clients all the time.
    let mut connected = UnixStream::connect(&path).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Relaxed) {
                assert!(served(&path), "after {count}");
                count += 1;
            }
            count
        });
        let end = SetAtEnd(&done);
        let modes = [(", mode = \"600\"", 0o600), ("", 0o666), (", mode = \"660\"", 0o660)];
        for (keys, expected) in modes {
            daemon.must_reload(&with(keys));
            assert_eq!(mode(&path), expected);
        }
        // Neither of these is there: nothing changes, and it is said why.
        let unknown = with(", mode = \"600\", owner = \"no-such-user\"");
        let refused = daemon.reload(&unknown);
        assert_eq!(refused.message, "reload refused");
        let why = "owner: there is no user \"no-such-user\"; create it or write another";
        assert!(refused.get("error").unwrap().contains(why), "{}", refused.raw);
        assert_eq!(mode(&path), 0o660);
        let unknown = with(", mode = \"600\", group = \"no-such-group\"");
        assert_eq!(daemon.reload(&unknown).message, "reload refused");
        // What is refused for another reason takes it back.
        let other = with(", mode = \"600\"");
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let blocked = other.replace(" }]", &format!(" }}, \"{address}\"]"));
        assert_eq!(daemon.reload(&blocked).message, "reload refused");
        assert_eq!(mode(&path), 0o660);
        if needs::is_root() {
            daemon.must_reload(&with(&format!(
                ", mode = \"660\", owner = {OTHER}, group = \"{OTHER}\""
            )));
            assert_eq!((mode(&path), owner(&path)), (0o660, (OTHER, OTHER)));
            daemon.must_reload(&with(""));
            let own = (geteuid().as_raw(), nix::unistd::getegid().as_raw());
            assert_eq!((mode(&path), owner(&path)), (0o666, own));
        }
        drop(end);
        assert!(clients.join().unwrap() > 0);
    });
    assert_eq!(fs::metadata(&path).unwrap().ino(), made, "it is the same socket");
    assert_eq!(daemon.pids(&ports), pids);
    assert_eq!(daemon.said(Mark::START, "listening").len(), 1);
    connected.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    connected.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn run_takes_a_path_and_nothing_that_would_be_another() {
    let folder = tempfile::tempdir().unwrap();
    for (listen, write) in [
        ("unix:@web", "\"unix:/run/web.sock\""),
        ("unix:web.sock,mode=660", "{ unix = \"web.sock\", mode = \"660\" }"),
    ] {
        let arguments = ["run", "--listen", listen, "--workers", "1", "--", "sleep", "1"];
        let output = lbd(folder.path(), &arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("--listen: ") && said.contains(write), "{said}");
        assert_eq!(output.status.code(), Some(2), "{said}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn what_another_program_put_in_its_place_stays() {
    let ports = Ports::take(1);
    let mut daemon = Daemon::healthy(&service(&ports, "\"unix:web.sock\""), 1);
    let path = daemon.path("web.sock");
    fs::remove_file(&path).unwrap();
    fs::write(&path, "theirs").unwrap();
    daemon.signal(Signal::SIGTERM);
    daemon.wait_stopped();
    assert_eq!(fs::read_to_string(&path).unwrap(), "theirs");
}

/// A folder of another user, in it a link to a file of root alone, and that user, who puts the link
/// in the place of every socket the moment that it is there.
struct Attack {
    folder: TempDir,
    secret: PathBuf,
    /// Of the secret.
    mode: u32,
}

impl Attack {
    fn on_file_with(mode: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let secret = folder.path().join("secret");
        fs::write(&secret, "").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(mode)).unwrap();
        let theirs = folder.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        chown(&theirs, Some(OTHER), Some(OTHER)).unwrap();
        Self { folder, secret, mode }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("theirs/s")
    }

    /// Runs `lbd` again and again while the other user does it. How often the socket was swapped.
    fn run(&self, config: &str, ready: &str) -> u32 {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let attacker = scope.spawn(|| {
                // Of this thread alone (credentials(7)); from here on it has no right of root's.
                setfsgid(Gid::from_raw(OTHER));
                setfsuid(Uid::from_raw(OTHER));
                let (path, link) = (self.path(), self.folder.path().join("theirs/link"));
                let mut swapped = 0;
                while !done.load(Relaxed) {
                    symlink(&self.secret, &link).unwrap();
                    let is_socket = || {
                        fs::symlink_metadata(&path).is_ok_and(|file| file.file_type().is_socket())
                    };
                    while !done.load(Relaxed) && !is_socket() {
                        std::hint::spin_loop();
                    }
                    fs::rename(&link, &path).unwrap();
                    swapped += 1;
                    thread::sleep(Duration::from_millis(1));
                    fs::remove_file(&path).unwrap();
                }
                swapped
            });
            let end = SetAtEnd(&done);
            for _ in 0..25 {
                let folder = tempfile::tempdir().unwrap();
                let mut daemon = Daemon::start_in(folder, config);
                daemon.log.wait_for(Mark::START, "its start, or its end", 1, |line| {
                    line.message == ready
                        || line.raw.contains("cannot listen on")
                        || line.raw.contains("can't listen on")
                });
                daemon.signal(Signal::SIGQUIT);
                daemon.wait_exit();
                assert_eq!((mode(&self.secret), owner(&self.secret)), (self.mode, (0, 0)));
            }
            drop(end);
            attacker.join().unwrap()
        })
    }
}

#[test]
fn whoever_owns_the_folder_gets_no_file_of_roots_opened() {
    if !needs::is_root() {
        return;
    }
    let attack = Attack::on_file_with(0o600);
    let ports = Ports::take(1);
    let path = attack.path();
    let listen = format!("{{ unix = \"{}\", owner = {OTHER} }}", path.display());
    let swapped = attack.run(&service(&ports, &listen), "listening");
    assert!(swapped > 10, "{swapped}");
    // Without the attack it goes as ever.
    let daemon = Daemon::healthy(&service(&ports, &listen), 1);
    assert_eq!((mode(&path), owner(&path).0), (0o666, OTHER));
    assert!(served(&path));
    drop(daemon);
}

#[test]
fn nor_by_way_of_the_admin_socket() {
    if !needs::is_root() {
        return;
    }
    let attack = Attack::on_file_with(0o400);
    let ports = Ports::take(1);
    let admin = format!("\n[admin]\nsocket = \"{}\"\n", attack.path().display());
    let config = service(&ports, &format!("\"{}\"", ports.address())) + &admin;
    let swapped = attack.run(&config, "listening");
    assert!(swapped > 10, "{swapped}");
    let daemon = Daemon::healthy(&config, 1);
    assert_eq!((mode(&attack.path()), owner(&attack.path())), (0o600, (0, 0)));
    drop(daemon);
}

#[test]
fn an_owner_that_is_not_there_is_named_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let config = "[service.web]\ncommand = [\"/bin/sh\"]\n\
        listen = { unix = \"web.sock\", owner = \"no-such-user\" }\n";
    let file = folder.path().join("lb.toml");
    fs::write(&file, config).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lbd"));
        command.args(arguments).current_dir(folder.path()).env_remove("RUNTIME_DIRECTORY");
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (status, said) = run(&["check"]);
    let warned =
        "lb.toml:3: service.web.listen.owner: warning: there is no user \"no-such-user\" yet";
    assert_eq!(status, Some(0), "{said}");
    assert!(said.starts_with(warned), "{said}");
    let (status, said) = run(&[]);
    let expected = format!(
        "lbd: service web: can't listen on unix:{}: owner: there is no user \"no-such-user\"; \
         create it or write another ({}:3: service.web.listen)\n",
        folder.path().join("web.sock").display(),
        file.display()
    );
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains(&expected), "{said}");
    assert!(!folder.path().join("web.sock").exists());
}
