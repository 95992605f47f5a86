//! Tells the binary which commit it was built from and of when that is, where they can be known.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LBD_COMMIT");
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    // A package built outside a checkout names its commit in the environment.
    let commit = std::env::var("LBD_COMMIT").ok().or_else(|| {
        // The log changes with every commit and checkout of this work tree.
        let log = git(&["rev-parse", "--git-path", "logs/HEAD"])?;
        println!("cargo:rerun-if-changed={log}");
        git(&["rev-parse", "--short=12", "HEAD"])
    });
    println!("cargo:rustc-env=LBD_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
    let date = git(&["log", "-1", "--format=%cs"]);
    println!("cargo:rustc-env=LBD_DATE={}", date.as_deref().unwrap_or("\"\""));
}
