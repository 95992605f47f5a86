//! A real systemd, booted by `tests/systemd/machine`: an overlay of this machine's root, in which
//! anything may be done.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};

use super::{
    PATIENCE, eventually,
    needs::{SYSTEMD, missing},
};

/// A booted machine. Dropped, it is gone, with everything in it.
pub(crate) struct Machine {
    script: Child,
    /// The pid of its init, here.
    pub(crate) init: i32,
    /// What ran when it was up.
    pub(crate) before: Vec<String>,
}

impl Machine {
    /// Boots one in which these folders are below `/host`. `None` where none can be booted.
    pub(crate) fn boot(shared: &[&Path]) -> Option<Self> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut script = Command::new(source.join("tests/systemd/machine"))
            .args(["--time", "240"])
            .args(shared.iter().flat_map(|folder| [Path::new("--share"), folder]))
            // Ends when this process does, in whatever way.
            .args(["--", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        for line in BufReader::new(script.stderr.take().unwrap()).lines() {
            let line = line.unwrap();
            if let Some(pid) = line.strip_prefix("machine: up, pid=") {
                let init = pid.parse().unwrap();
                let mut machine = Self { script, init, before: Vec::new() };
                // The script's own command is about to.
                eventually("cat runs in it", || {
                    machine.before = machine.processes();
                    machine.before.iter().any(|name| name == "cat")
                });
                return Some(machine);
            }
            said += &(line + "\n");
        }
        let status = script.wait().unwrap();
        assert_eq!(status.code(), Some(77), "{said}");
        missing(SYSTEMD, said.trim_end());
        None
    }

    fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--all", "--target", &self.init.to_string(), "timeout", "60"])
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null());
        command
    }

    /// What becomes of the commands.
    pub(crate) fn attempt(&self, script: &str) -> Output {
        self.enter().args(["bash", "-euc", script]).output().unwrap()
    }

    /// What the commands print; they have to succeed.
    pub(crate) fn run(&self, script: &str) -> String {
        let output = self.attempt(script);
        let said = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
        if !output.status.success() {
            let journal =
                self.attempt("journalctl --no-pager -n 60; systemctl --no-pager status lbd");
            let error = String::from_utf8_lossy(&output.stderr);
            let journal = String::from_utf8_lossy(&journal.stdout);
            panic!("{script}\n{}: {said}\n{error}\n{journal}", output.status);
        }
        said
    }

    /// Writes a file.
    pub(crate) fn write(&self, path: &str, text: &str) {
        fs::write(format!("/proc/{}/root{path}", self.init), text).unwrap();
    }

    /// A property of the service.
    pub(crate) fn show(&self, property: &str) -> String {
        self.run(&format!("systemctl show --property {property} --value lbd.service"))
    }

    /// Waits until the property of the service is that, or has it in it.
    pub(crate) fn wait(&self, property: &str, wanted: &str) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            let value = self.show(property);
            if value == wanted || wanted.len() > 8 && value.contains(wanted) {
                return value;
            }
            if Instant::now() > until {
                self.run(&format!("echo {property}={value:?}, not {wanted:?}; false"));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Of the service: its pid in the machine.
    pub(crate) fn main_pid(&self) -> i32 {
        self.show("MainPID").parse().unwrap()
    }

    /// What the pid in the machine is here (`NSpid` of proc_pid_status(5)).
    pub(crate) fn outside(&self, pid: i32) -> i32 {
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let here = namespace(&self.init.to_string()).unwrap();
        let entries = fs::read_dir("/proc").unwrap();
        let mut pids = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let is_it = |outside: &String| {
            namespace(outside).as_ref() == Some(&here)
                && fs::read_to_string(format!("/proc/{outside}/status")).is_ok_and(|status| {
                    let ids = status.lines().find(|line| line.starts_with("NSpid:"));
                    ids.unwrap().split_whitespace().last() == Some(&*pid.to_string())
                })
        };
        pids.find(is_it).expect("there is no such process").parse().unwrap()
    }

    /// The pids of the workers, in the machine, as `lbd status` has them.
    pub(crate) fn workers(&self) -> Vec<i32> {
        let status = self.run("lbd status --config /etc/lbd/lb.toml --json");
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let services = status["services"].as_array().unwrap().iter();
        let workers = services.flat_map(|service| service["workers"].as_array().unwrap().clone());
        workers.map(|worker| i32::try_from(worker["pid"].as_i64().unwrap_or(0)).unwrap()).collect()
    }

    /// Has this thread, and those that it starts, connect to what is in the machine.
    pub(crate) fn join_network(&self) {
        let network = File::open(format!("/proc/{}/ns/net", self.init)).unwrap();
        setns(network, CloneFlags::CLONE_NEWNET).unwrap();
    }

    /// The names of all that runs, that which looks for them included.
    pub(crate) fn processes(&self) -> Vec<String> {
        let all = self.run("exec ps --no-headers -e -o comm");
        let mut names: Vec<_> = all.lines().map(str::to_owned).collect();
        names.sort_unstable();
        names
    }

    /// Ends it, as the kernel does for whoever is killed.
    pub(crate) fn end(&mut self) {
        drop(self.script.stdin.take());
        self.script.wait().unwrap();
    }

    /// Stops all, and looks for what is left.
    pub(crate) fn stop_and_look(&self) {
        self.run("systemctl stop lbd.socket lbd.service");
        assert_eq!(self.show("ActiveState"), "inactive");
        assert_eq!(self.show("Result"), "success");
        let left = self.run(
            "ls -d /run/lbd /run/private/lbd /sys/fs/cgroup/system.slice/lbd.service 2>/dev/null || true
             ss --no-header --listening --tcp --processes",
        );
        assert_eq!(left, "", "left behind");
        assert_eq!(self.processes(), self.before, "left running");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.script.stdin.take());
        let _ = self.script.wait();
    }
}
