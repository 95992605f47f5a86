//! The Debian package that `LBD_DEB` names, as `packaging/deb/build` made it: what lintian says of it,
//! and what becomes of a machine on which it is installed, upgraded and purged.
//!
//! Needs what `tests/systemd/machine` needs.

use std::{
    collections::BTreeSet,
    env, fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::{
    client::{KeepAlive, Load},
    machine::Machine,
    needs::{PACKAGING, has, missing},
};
use tempfile::TempDir;

/// `None` where there is none to test.
fn package() -> Option<PathBuf> {
    match env::var_os("LBD_DEB") {
        Some(path) => Some(fs::canonicalize(path).unwrap()),
        None => {
            missing(PACKAGING, "LBD_DEB names no package (packaging/deb/build makes one)");
            None
        }
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    said.into_owned()
}

#[test]
fn lintian_has_no_complaint() {
    let Some(package) = package() else { return };
    if has(PACKAGING, "lintian", "lintian") {
        let judge = ["--fail-on", "error,warning", "--tag-display-limit", "0", "--allow-root"];
        eprintln!("{}", run(Command::new("lintian").args(judge).arg(package)));
    }
}

/// The package, and the same in higher versions.
struct Versions {
    folder: TempDir,
    tree: PathBuf,
}

impl Versions {
    fn of(package: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        run(Command::new("dpkg-deb").arg("--raw-extract").args([package, &tree]));
        fs::copy(package, folder.path().join("0.deb")).unwrap();
        Self { folder, tree }
    }

    /// One in which `change` was made to this file of it.
    fn make(&self, number: u32, file: &str, change: (&str, &str)) {
        self.edit("DEBIAN/control", |control| {
            let version = control.lines().find(|line| line.starts_with("Version: ")).unwrap();
            control.replace(version, &format!("Version: 99.{number}-1"))
        });
        self.edit(file, |text| {
            assert!(text.contains(change.0), "{text}");
            text.replace(change.0, change.1)
        });
        let to = self.folder.path().join(format!("{number}.deb"));
        run(Command::new("dpkg-deb").args(["-Znone", "--build"]).args([&self.tree, &to]));
    }

    fn edit(&self, file: &str, edit: impl FnOnce(&str) -> String) {
        let file = self.tree.join(file);
        let text = fs::read_to_string(&file).unwrap();
        fs::write(file, edit(&text)).unwrap();
    }

    fn install(&self, machine: &Machine, number: u32) -> String {
        let folder = self.folder.path().display();
        machine.run(&format!("dpkg --install /host{folder}/{number}.deb 2>&1"))
    }
}

/// Every name that a package or a service could leave behind, but for what dpkg and man-db keep of
/// their own, and the journal.
fn names(machine: &Machine) -> BTreeSet<String> {
    let found = machine.run(
        "find /etc /opt /run /srv /usr /var /var/lib /var/log -xdev \
             -path /var/lib/dpkg -prune -o -path /var/cache -prune -o -path /var/log/journal -prune \
             -o -path /run/log -prune -o -path /var/log/dpkg.log -o -path /run/systemd -prune -o -print",
    );
    found.lines().map(ToOwned::to_owned).collect()
}

#[test]
fn it_is_installed_upgraded_and_purged() {
    let Some(package) = package() else { return };
    let versions = Versions::of(&package);
    versions.make(1, "usr/share/lbd/www/index.html", ("<title>", "<title>One: "));
    versions.make(2, "usr/share/lbd/www/index.html", ("One: ", "Two: "));
    versions.make(3, "DEBIAN/postinst", ("timeout 60", "timeout 2"));
    let Some(machine) = Machine::boot(&[versions.folder.path()]) else { return };
    machine.join_network();
    // What containers have so that nothing is started and manual pages are left out; and the index of
    // manual pages, which takes seconds each time.
    machine.run("rm -f /usr/sbin/policy-rc.d /etc/dpkg/dpkg.cfg.d/* /var/lib/man-db/auto-update");
    let before = names(&machine);

    // Installed, it serves, and is there after a boot.
    versions.install(&machine, 0);
    machine.wait("StatusText", "workers healthy");
    assert_eq!(machine.show("UnitFileState"), "enabled");
    assert!(index().contains("<title>"), "{}", index());
    let table = machine.run("lbd status --config /etc/lbd/lb.toml");
    assert!(table.contains("healthy") && !machine.workers().is_empty(), "{table}");
    machine.run(
        "dpkg --verify lbd && lbd check --config /etc/lbd/lb.toml
         zgrep -q 'lbd.-status' /usr/share/man/man1/lbd.1.gz
         zgrep -q limits.memory /usr/share/man/man5/lb.toml.5.gz
         cd /usr/share && test -s bash-completion/completions/lbd -a -s fish/vendor_completions.d/lbd.fish \
             -a -s zsh/vendor-completions/_lbd -a -s doc/lbd/copyright -a -s doc/lbd/changelog.Debian.gz \
             -a -s doc/lbd/examples/lbd.service.d/hardening.conf",
    );

    an_upgrade_restarts_it_and_keeps_the_file(&machine, &versions);
    with_the_socket_no_client_is_refused(&machine, &versions);
    no_app_that_does_not_come_up_holds_up_dpkg(&machine, &versions);

    // Removed, it is gone but for what a new installation would want; then all of it is.
    machine.run("dpkg --remove lbd");
    assert!(TcpStream::connect(address()).is_err(), "nobody is there");
    assert_eq!(machine.processes(), machine.before);
    machine.run("test -s /etc/lbd/lb.toml -a -d /var/lib/private/lbd -a -d /var/log/private/lbd");
    machine.run("dpkg --purge lbd");
    let after = names(&machine);
    let left: Vec<_> = after.difference(&before).collect();
    let missing: Vec<_> = before.difference(&after).collect();
    assert!(left.is_empty() && missing.is_empty(), "left: {left:#?}, missing: {missing:#?}");
    assert_eq!(machine.run("systemctl --no-legend --all list-units 'lbd*'"), "");
    assert_eq!(machine.run("ls -d /sys/fs/cgroup/system.slice/lbd* 2>/dev/null || true"), "");
}

fn address() -> SocketAddr {
    "127.0.0.1:44444".parse().unwrap()
}

fn index() -> String {
    let (status, body) = KeepAlive::new(address()).get("/").unwrap();
    assert_eq!(status, 200);
    String::from_utf8_lossy(&body).into_owned()
}

fn an_upgrade_restarts_it_and_keeps_the_file(machine: &Machine, versions: &Versions) {
    let (main, mine) = (machine.main_pid(), "balance = \"least-connections\"");
    machine.run(&format!("echo '{mine}' >>/etc/lbd/lb.toml"));
    versions.install(machine, 1);
    machine.wait("StatusText", "workers healthy");
    assert_ne!(machine.main_pid(), main);
    assert!(index().contains("<title>One: "));
    machine.run(&format!("grep -q '{mine}' /etc/lbd/lb.toml"));

    // One that is disabled and stopped stays so.
    machine.run("systemctl disable --now lbd.service");
    versions.install(machine, 0);
    assert_eq!(machine.show("ActiveState"), "inactive");
    assert_eq!(machine.show("UnitFileState"), "disabled");
    machine.run("systemctl enable --now lbd.service");
}

fn with_the_socket_no_client_is_refused(machine: &Machine, versions: &Versions) {
    // As docs/OPERATING.md says it.
    machine.run("systemctl enable lbd.socket && systemctl restart lbd.service");
    machine.run("systemctl is-active lbd.socket");
    let load = Load::start(address(), "/page.html");
    load.more(50);
    for number in [1, 2] {
        let main = machine.main_pid();
        versions.install(machine, number);
        assert_ne!(machine.main_pid(), main);
        load.more(50);
    }
    load.end_without_failure();
    assert!(index().contains("<title>Two: "));
    assert_eq!(machine.run("systemctl is-enabled lbd.socket"), "enabled");
}

fn no_app_that_does_not_come_up_holds_up_dpkg(machine: &Machine, versions: &Versions) {
    let api =
        "[service.api]\nlisten = \"127.0.0.1:44445\"\nworkers = 1\ncommand = [\"/no/such\"]\n";
    machine.run(&format!("cp /etc/lbd/lb.toml /tmp/ && echo '{api}' >>/etc/lbd/lb.toml"));
    let said = versions.install(machine, 3);
    assert!(said.contains("lbd is not ready; systemctl status lbd tells why"), "{said}");
    assert_eq!(machine.show("ActiveState"), "activating");
    assert!(index().contains("<title>Two: "), "the other service is served all the same");
    machine.run(
        "cp /tmp/lb.toml /etc/lbd/ && kill -HUP $(systemctl show --property MainPID --value lbd)",
    );
    machine.wait("ActiveState", "active");
}
