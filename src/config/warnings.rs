//! Warnings about a valid configuration: things that it names but that don't exist yet, or that are
//! probably not meant. A worker that needs such a thing will not start; others will.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    io::ErrorKind,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
};

use nix::unistd::{Group, User};

use super::{
    Config, Listen, Output, Problem, Program, Service, UnixAccess, reader,
    search_path::{DEFAULT_PATH, shown_path},
    values::quoted,
};

/// Shells, which expand `$PORT` themselves.
const SHELLS: [&str; 8] = ["sh", "bash", "dash", "ash", "zsh", "ksh", "fish", "busybox"];

/// Checks that everything exists that `config` names. Blocks: accounts may be looked up over the
/// network (nsswitch.conf(5)).
#[must_use]
pub fn warnings(config: &Config) -> Vec<Problem> {
    let mut found = Found { config, problems: Vec::new() };
    if let Some(file) = &config.log.file {
        found.parent("log.file", file);
    }
    if let Some(socket) = &config.admin.socket {
        found.parent("admin.socket", socket);
    }
    for service in &config.services {
        found.service(service);
    }
    found.problems.sort_by_key(|problem| problem.line);
    found.problems
}

struct Found<'c> {
    config: &'c Config,
    problems: Vec<Problem>,
}

impl Found<'_> {
    fn add(&mut self, key: &str, message: String) {
        let line = self.config.lines.get(key).copied();
        self.problems.push(Problem { line, key: Some(key.to_owned()), message });
    }

    fn service(&mut self, service: &Service) {
        let worker = &service.worker;
        let key = |key: &str| match self.config.path {
            Some(_) => format!("service.{}.{key}", reader::shown_key(&service.name)),
            None => format!("--{key}"),
        };
        let (listen, user, group) = (key("listen"), key("user"), key("group"));
        let (directory, output, command) = (key("directory"), key("output"), key("command"));
        for address in &service.listen {
            if let Listen::Unix(path) = address {
                self.parent(&listen, path);
                let UnixAccess { owner, group, .. } = service.access(path);
                // In a list of addresses, single entries have no line of their own.
                let key = |key: &str| {
                    let key = format!("{listen}.{key}");
                    if self.config.lines.contains_key(&key) { key } else { listen.clone() }
                };
                let (owner_key, group_key) = (key("owner"), key("group"));
                self.user(&owner_key, owner.as_deref());
                self.group(&group_key, group.as_deref());
            }
        }
        self.user(&user, worker.user.as_deref());
        self.group(&group, worker.group.as_deref());
        if let Output::File(path) = &worker.output {
            let text = path.to_string_lossy();
            let path = text.replace("{service}", &service.name).replace("{slot}", "0");
            self.parent(&output, Path::new(&path));
        }
        let is_there = self.folder(&directory, &worker.directory);
        let Program::Command(argv) = &worker.program else { return };
        // If the folder is missing, so is a program in it.
        if is_there && let Some(message) = argv.first().and_then(|name| missing(name, service)) {
            self.add(&command, message);
        }
        if let Some(wrong) = unexpanded(argv) {
            self.add(&command, format!("{wrong} is not replaced there; write {{port}}"));
        }
    }

    fn user(&mut self, key: &str, name: Option<&str>) {
        if let Some(name) = name.filter(|name| !is_number(name))
            && matches!(User::from_name(name), Ok(None))
        {
            let name = quoted(name);
            self.add(key, format!("there is no user {name} yet; add it, or mend the name"));
        }
    }

    fn group(&mut self, key: &str, name: Option<&str>) {
        if let Some(name) = name.filter(|name| !is_number(name))
            && matches!(Group::from_name(name), Ok(None))
        {
            let name = quoted(name);
            self.add(key, format!("there is no group {name} yet; add it, or mend the name"));
        }
    }

    /// Warns if the folder does not exist. Returns whether it exists.
    fn folder(&mut self, key: &str, path: &Path) -> bool {
        let shown = path.display();
        let message = match fs::metadata(path) {
            Ok(found) if found.is_dir() => return true,
            Ok(_) => format!("{shown} is not a folder"),
            Err(error) if is_missing(error.kind()) => {
                format!("{shown} does not exist yet; make it, or write another")
            }
            // The user that it is meant for may still have access.
            Err(_) => return true,
        };
        self.add(key, message);
        false
    }

    /// Warns if the parent folder of a file does not exist.
    fn parent(&mut self, key: &str, path: &Path) {
        if let Some(parent) = path.parent() {
            self.folder(key, parent);
        }
    }
}

fn is_number(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_missing(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Why the program can't be found. Searches as starting a worker does.
fn missing(name: &str, service: &Service) -> Option<String> {
    let worker = &service.worker;
    // The placeholder's value may differ between workers.
    if name.contains('{') {
        return None;
    }
    let shown = quoted(name);
    if name.contains('/') {
        let file = worker.directory.join(name);
        let seen = file.display();
        return match look(&file) {
            Lookup::Runs => None,
            Lookup::NotThere => Some(format!("there is no program {seen} yet")),
            Lookup::NotExecutable => Some(format!("{seen} is not executable; chmod +x it")),
        };
    }
    let own = || env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let path = worker.env.get("PATH").map_or_else(own, OsString::from);
    let folders = path.as_bytes().split(|&byte| byte == b':');
    let file =
        |folder: &[u8]| -> PathBuf { worker.directory.join(OsStr::from_bytes(folder)).join(name) };
    let found: Vec<_> = folders.map(|folder| look(&file(folder))).collect();
    if found.contains(&Lookup::Runs) {
        None
    } else if found.contains(&Lookup::NotExecutable) {
        Some(format!("the program {shown} in PATH is not executable; chmod +x it"))
    } else {
        let path = shown_path(&path);
        Some(format!("there is no program {shown} in PATH ({path}) yet; write its whole path"))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lookup {
    Runs,
    NotThere,
    NotExecutable,
}

fn look(file: &Path) -> Lookup {
    match fs::metadata(file) {
        Ok(found) if found.is_dir() => Lookup::NotThere,
        Ok(found) if found.permissions().mode() & 0o111 == 0 => Lookup::NotExecutable,
        Err(error) if is_missing(error.kind()) => Lookup::NotThere,
        // The worker's user may see more.
        Ok(_) | Err(_) => Lookup::Runs,
    }
}

/// A port variable in another program's notation that nobody will expand.
fn unexpanded(argv: &[String]) -> Option<&'static str> {
    let is_shell = |word: &String| {
        let name = word.rsplit('/').next().unwrap_or_default();
        SHELLS.contains(&name)
    };
    let mut in_shell = false;
    for word in argv {
        let own = ["${PORT}", "$PORT"].into_iter().find(|own| word.contains(own));
        match own {
            Some(own) if !in_shell => return Some(own),
            // In a shell `${PORT}` is right, and it contains the third form.
            Some(_) => {}
            None if word.contains("{PORT}") => return Some("{PORT}"),
            None => {}
        }
        in_shell |= is_shell(word);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str, base: &Path) -> Vec<String> {
        let config = super::super::parse(text, &base.join("lb.toml")).unwrap();
        let place = |problem: Problem| {
            let (line, key) = (problem.line.unwrap(), problem.key.unwrap());
            let message = problem.message.replace(base.to_str().unwrap(), "BASE");
            format!("{line}: {key}: {message}")
        };
        warnings(&config).into_iter().map(place).collect()
    }

    #[test]
    fn what_is_not_there_is_told_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("plain"), "").unwrap();
        let text = "\
[log]
file = \"logs/lbd.log\"

[service.web]
listen = [\"127.0.0.1:1\", \"unix:run/x.sock\"]
command = [\"no-such-program\", \"--port\", \"$PORT\"]
user = \"no-such-user\"
group = \"no-such-group\"
output = \"out/{service}/{slot}.log\"
env.PATH = \"/nowhere:/bin\"

[service.\"a.b\"]
listen = \"127.0.0.1:2\"
command = [\"./plain\"]

[service.c]
listen = \"127.0.0.1:3\"
command = [\"./missing\", \"{PORT}\"]

[admin]
socket = \"none/admin.sock\"
";
        let expected = [
            "2: log.file: BASE/logs does not exist yet; make it, or write another",
            "5: service.web.listen: BASE/run does not exist yet; make it, or write another",
            "6: service.web.command: there is no program \"no-such-program\" in PATH \
             (/nowhere:/bin) yet; write its whole path",
            "6: service.web.command: $PORT is not replaced there; write {port}",
            "7: service.web.user: there is no user \"no-such-user\" yet; add it, or mend the name",
            "8: service.web.group: there is no group \"no-such-group\" yet; add it, or mend the name",
            "9: service.web.output: BASE/out/web does not exist yet; make it, or write another",
            "14: service.\"a.b\".command: BASE/./plain is not executable; chmod +x it",
            "18: service.c.command: there is no program BASE/./missing yet",
            "18: service.c.command: {PORT} is not replaced there; write {port}",
            "21: admin.socket: BASE/none does not exist yet; make it, or write another",
        ];
        assert_eq!(told(text, folder.path()), expected);
    }

    #[test]
    fn whom_a_unix_socket_is_to_belong_to_has_to_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let text = "\
[service.a]
command = [\"/bin/sh\"]
listen.unix = \"a.sock\"
listen.owner = \"no-such-user\"
listen.group = \"no-such-group\"

[service.b]
command = [\"/bin/sh\"]
listen = [\"127.0.0.1:1\",
    { unix = \"b.sock\", owner = \"root\", group = \"no-such-group\" }]
";
        let expected = [
            "4: service.a.listen.owner: there is no user \"no-such-user\" yet; add it, or mend the name",
            "5: service.a.listen.group: there is no group \"no-such-group\" yet; add it, or mend the name",
            "9: service.b.listen: there is no group \"no-such-group\" yet; add it, or mend the name",
        ];
        assert_eq!(told(text, folder.path()), expected);
    }

    #[test]
    fn what_is_there_is_no_news() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("out")).unwrap();
        let text = "\
log.file = \"lbd.log\"
[service.web]
listen = [\"127.0.0.1:1\", \"unix:x.sock\"]
command = [\"sh\", \"-c\", \"exec app --port $PORT ${PORT}\"]
user = \"root\"
group = \"0\"
output = \"out/{slot}.log\"
directory = \"out\"
";
        assert_eq!(told(text, folder.path()), [""; 0]);
    }

    #[test]
    fn only_a_shell_knows_the_port_by_that_name() {
        let wrong = |argv: &[&str]| {
            unexpanded(&argv.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(wrong(&["node", "x.js", "--port=${PORT}"]), Some("${PORT}"));
        assert_eq!(wrong(&["gunicorn", "-b", ":$PORT"]), Some("$PORT"));
        assert_eq!(wrong(&["x", "{PORT}"]), Some("{PORT}"));
        assert_eq!(wrong(&["/bin/bash", "-lc", "x $PORT"]), None);
        assert_eq!(wrong(&["nice", "sh", "-c", "x ${PORT}"]), None);
        assert_eq!(wrong(&["sh", "-c", "x {PORT}"]), Some("{PORT}"));
        assert_eq!(wrong(&["x", "{port}", "$HOME", "PORT"]), None);
    }
}
