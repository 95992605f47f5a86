//! The manual pages and the completions, by those who read them.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::{
    lbd,
    needs::{PACKAGING, has},
};
use tempfile::TempDir;

/// What a command prints; it has to succeed.
fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn lbd_said(arguments: &[&str]) -> String {
    let output = lbd(Path::new("/"), arguments);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The commands, as `lbd --help` lists them.
fn commands() -> BTreeSet<String> {
    let help = lbd_said(&["--help"]);
    let list = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names = list.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let names = names.filter(|name| !name.is_empty() && *name != "help");
    names.map(ToOwned::to_owned).collect()
}

/// All pages, written to a folder.
fn pages() -> (TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("share/man");
    assert_eq!(lbd_said(&["man", tree.to_str().unwrap()]), "");
    let sections = ["man1", "man5"].map(|section| fs::read_dir(tree.join(section)).unwrap());
    let pages = sections.into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    (folder, pages)
}

#[test]
fn each_command_has_a_page_and_an_example() {
    let (_folder, pages) = pages();
    let names: BTreeSet<_> =
        pages.iter().map(|page| page.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    let commands = commands();
    assert!(commands.contains("status") && commands.contains("man"), "{commands:?}");
    let expected = commands.iter().map(|name| format!("lbd-{name}.1"));
    let expected = expected.chain(["lbd.1", "lb.toml.5"].map(ToOwned::to_owned)).collect();
    assert_eq!(names, expected);
    for name in &commands {
        let help = lbd_said(&[name, "--help"]);
        assert!(help.contains("\nExample: lbd ") || help.contains("\nExamples: lbd "), "{help}");
    }
}

#[test]
fn the_main_page_has_what_operators_look_for() {
    let page = lbd_said(&["man"]);
    for wanted in [
        ".SH SIGNALS\n.TP\n\\fBSIGHUP\\fR\nRe\\-reads",
        ".SH \"EXIT STATUS\"\n.TP\n0\nStopped as asked",
        ".TP\n78\nThe configuration is wrong",
        ".SH FILES\n.TP\n\\fBlb.toml\\fR\n",
        ".SH ENVIRONMENT\n.TP\n\\fBNO_COLOR\\fR\n",
        ".SH EXAMPLES\n",
        "lbd restart web 2\n",
        "\\fBlb.toml\\fR(5)",
    ] {
        assert!(page.contains(wanted), "{wanted:?} is not in\n{page}");
    }
    let (folder, _) = pages();
    let written = fs::read_to_string(folder.path().join("share/man/man1/lbd.1")).unwrap();
    assert_eq!(page, written);
}

#[test]
fn the_pages_are_without_fault() {
    let (_folder, pages) = pages();
    if has(PACKAGING, "mandoc", "mandoc") {
        // That of clap_mangen's list of possible values.
        let fine = |line: &str| line.contains("WARNING: skipping paragraph macro: br ");
        let judge = Command::new("mandoc").args(["-Tlint", "-Wwarning"]).args(&pages).output();
        let said = String::from_utf8(judge.unwrap().stdout).unwrap();
        let faults: Vec<_> = said.lines().filter(|line| !fine(line)).collect();
        assert!(faults.is_empty(), "{faults:#?}");
    }
    if has(PACKAGING, "man", "man-db") {
        for page in &pages {
            let output = Command::new("man")
                .args(["--warnings", "--encoding=UTF-8", "--local-file"])
                .arg(page)
                .envs([("MANWIDTH", "80"), ("LC_ALL", "C.UTF-8")])
                .output()
                .unwrap();
            let warned = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && warned.is_empty(), "{}: {warned}", page.display());
        }
    }
}

#[test]
fn the_page_of_the_file_has_the_keys_that_lbd_knows_and_no_others() {
    let (folder, _) = pages();
    let page = fs::read_to_string(folder.path().join("share/man/man5/lb.toml.5")).unwrap();
    let (documented, known) = (documented_keys(&page), known_keys());
    for key in &known - &documented {
        let refused = complaints(&format!("{SERVICE}{key} = 1\n"));
        assert!(refused.contains("not supported yet"), "{key} is not documented; {refused}");
    }
    assert_eq!(&documented - &known, BTreeSet::new());
    assert!(documented.len() > 30, "{documented:?}");
}

const SERVICE: &str = "[service.web]\nlisten = \"127.0.0.1:1\"\ncommand = [\"x\"]\n";

/// The tags of the page; after `restart.min-delay`, `.max-delay` is `restart.max-delay`.
fn documented_keys(page: &str) -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    for tag in page.split("\n.TP\n").skip(1).map(|rest| rest.lines().next().unwrap()) {
        let mut table = "";
        for key in tag.split("\\fB").skip(1).map(|rest| rest.split("\\fR").next().unwrap()) {
            let name = key.strip_prefix('.');
            if let (None, Some((before, _))) = (name, key.split_once('.')) {
                table = before;
            }
            let key = name.map_or_else(|| key.to_owned(), |name| format!("{table}.{name}"));
            keys.insert(key.replace("\\-", "-"));
        }
    }
    keys
}

/// What lbd offers in place of a key that it does not know, of each table.
fn known_keys() -> BTreeSet<String> {
    let tables = ["health", "restart", "rollout", "stop", "limits"];
    let unknown = "no-such-key-here = 1\n";
    let nested: String = tables.map(|table| format!("{table}.{unknown}")).concat();
    let file = format!("[log]\n{unknown}[admin]\n{unknown}{SERVICE}{unknown}{nested}");
    let said = complaints(&file);
    assert_eq!(said.lines().count(), 8, "{said}");
    let mut keys = BTreeSet::new();
    for line in said.lines() {
        let (place, known) = line.split_once(": unknown key; known here: ").expect(line);
        let place = place.rsplit(' ').next().unwrap();
        let table = place.trim_start_matches("service.web.").strip_suffix("no-such-key-here");
        let names = known.split(", ").filter(|name| !tables.contains(name));
        keys.extend(names.map(|name| format!("{}{name}", table.unwrap())));
    }
    keys
}

/// What lbd says to such a file.
fn complaints(file: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lb.toml"), file).unwrap();
    let output = lbd(folder.path(), &["check"]);
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn shells_complete_commands_and_options() {
    let folder = tempfile::tempdir().unwrap();
    let script = |shell: &str| {
        let path = folder.path().join(shell);
        fs::write(&path, lbd_said(&["completions", shell])).unwrap();
        path
    };
    // The commands that are offered for "lbd st", and an option for "lbd status --j".
    let expected = ["--json", "status", "stop"];
    let check = |shell: &str, offered: String| {
        let offered: BTreeSet<_> = offered.split_whitespace().collect();
        assert_eq!(offered, BTreeSet::from(expected), "{shell}");
    };
    if has(PACKAGING, "bash", "bash") {
        let ask = r#"source "$0"
            words() { COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
                _lbd lbd "${@: -1}" "${@: -2:1}"; echo "${COMPREPLY[@]}"; }
            words lbd st; words lbd status --j"#;
        check("bash", said(Command::new("bash").args(["-c", ask]).arg(script("bash"))));
    }
    if has(PACKAGING, "fish", "fish") {
        let ask = r#"source $argv[1]
            complete --do-complete "lbd st"; complete --do-complete "lbd status --j""#;
        let offered = said(
            Command::new("fish")
                .args(["--no-config", "-c", ask])
                .arg(script("fish"))
                .env("HOME", folder.path()),
        );
        check(
            "fish",
            offered
                .lines()
                .map(|line| line.split('\t').next().unwrap())
                .collect::<Vec<_>>()
                .join(" "),
        );
    }
    if has(PACKAGING, "zsh", "zsh") {
        // Without a terminal zsh completes nothing: that it loads is what can be seen.
        fs::copy(script("zsh"), folder.path().join("_lbd")).unwrap();
        let ask = r#"fpath=($0 $fpath); autoload -U compinit; compinit -u -D; print ${_comps[lbd]}
            autoload +X -Uz _lbd"#;
        let loaded = said(Command::new("zsh").args(["-f", "-c", ask]).arg(folder.path()));
        assert_eq!(loaded, "_lbd\n");
    }
}
