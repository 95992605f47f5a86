//! The dependency order of the modules, as the map in `src/lib.rs` draws it: imports run downward.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// What each module may import. A module may not be missing here.
const ALLOWED: [(&str, &[&str]); 15] = [
    ("cli", &["admin", "bench", "config", "daemon", "logging", "printable", "process", "worker"]),
    ("bench", &["admin", "config", "printable"]),
    (
        "daemon",
        &[
            "admin",
            "config",
            "histogram",
            "logging",
            "net",
            "printable",
            "probe",
            "process",
            "proxy",
            "supervisor",
        ],
    ),
    ("admin", &["config", "histogram", "logging", "net", "printable"]),
    ("probe", &["config", "net", "supervisor"]),
    ("process", &["config", "net", "printable"]),
    ("proxy", &["config", "histogram", "net", "per_thread"]),
    ("supervisor", &["config"]),
    ("logging", &["config", "printable"]),
    ("worker", &["net"]),
    ("net", &["config"]),
    ("histogram", &["per_thread"]),
    ("per_thread", &[]),
    ("config", &["printable"]),
    ("printable", &[]),
];

#[test]
fn imports_run_downward() {
    let allowed: BTreeMap<_, BTreeSet<_>> =
        ALLOWED.iter().map(|(module, may)| (*module, may.iter().copied().collect())).collect();
    let order: Vec<_> = ALLOWED.iter().map(|(module, _)| *module).collect();
    for (module, may) in &allowed {
        let above = order.iter().position(|other| other == module).unwrap();
        for other in may {
            assert!(order[above..].contains(other), "{module} may not import upward: {other}");
        }
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = BTreeSet::new();
    for file in rust_files(&source) {
        let relative = file.strip_prefix(&source).unwrap().with_extension("");
        let module = relative.iter().next().unwrap().to_str().unwrap().to_owned();
        if module == "lib" || module == "main" {
            continue;
        }
        let may = allowed.get(module.as_str()).unwrap_or_else(|| panic!("{module} has no place"));
        for import in imports(&fs::read_to_string(&file).unwrap()) {
            let fine = import == module || may.contains(import.as_str());
            assert!(fine, "{} imports crate::{import}", file.display());
            seen.insert((module.clone(), import));
        }
    }
    // The scan does find what is there.
    for (module, import) in [("daemon", "proxy"), ("supervisor", "config"), ("probe", "net")] {
        assert!(seen.contains(&(module.to_owned(), import.to_owned())), "{module} → {import}");
    }
}

/// The modules of `proxy`, each of which may use those behind it alone: what decides who gets which
/// connection knows of no engine, and no engine of the loop that drives it.
const PROXY: [&str; 5] = ["plane", "reactor", "tcp", "thread", "balance"];

#[test]
fn in_the_proxy_they_run_downward_too() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/proxy");
    let mut seen = BTreeSet::new();
    for file in rust_files(&source) {
        let relative = file.strip_prefix(&source).unwrap().with_extension("");
        let module = relative.iter().next().unwrap().to_str().unwrap().to_owned();
        let Some(rank) = PROXY.iter().position(|known| *known == module) else {
            assert_eq!(module, "mod", "{module} has no place");
            continue;
        };
        let code = fs::read_to_string(&file).unwrap();
        let words = |text: &str| -> Vec<String> {
            text.split(|c: char| !c.is_alphanumeric() && c != '_').map(str::to_owned).collect()
        };
        // Of this crate, and from above its own module: `use super::…` in its mod.rs, or in plane.rs.
        let is_outside = relative.ends_with("mod") || module == "plane";
        for import in code.split("\nuse ").skip(1).filter_map(|rest| rest.split(';').next()) {
            if import.starts_with("crate::") || is_outside && import.starts_with("super::") {
                for word in words(import) {
                    if let Some(other) = PROXY.iter().position(|known| *known == word) {
                        assert!(other >= rank, "{} imports {word}", file.display());
                        seen.insert((module.clone(), word));
                    }
                }
            }
        }
    }
    for (module, import) in [("tcp", "balance"), ("plane", "reactor"), ("reactor", "thread")] {
        assert!(seen.contains(&(module.to_owned(), import.to_owned())), "{module} → {import}");
    }
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let mut all: Vec<_> =
        files.into_iter().filter(|path| path.extension().is_some_and(|ext| ext == "rs")).collect();
    all.extend(folders.iter().flat_map(|folder| rust_files(folder)));
    all
}

/// The modules that `crate::…` names, also in a list: `crate::{a, b::{c, d}}`.
fn imports(source: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let code: String = source
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| [line, "\n"])
        .collect();
    for (index, _) in code.match_indices("crate::") {
        let before = code[..index].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
            continue;
        }
        let rest = &code[index + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => drop(found.insert(first_word(rest))),
            Some(list) => found.extend(names_of_list(list)),
        }
    }
    found
}

fn names_of_list(list: &str) -> Vec<String> {
    let (mut depth, mut names, mut start) = (0, Vec::new(), 0);
    for (index, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                names.push(first_word(&list[start..index]));
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                names.push(first_word(&list[start..index]));
                start = index + 1;
            }
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

fn first_word(text: &str) -> String {
    text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}
