//! What a test needs and not every machine has.
//!
//! Where it is missing, the test says so and does nothing else; but fails where `.ci/run`, which
//! installs it, has set the variable that is named for it.

use std::{env, fmt::Display, process::Command};

/// `promtool` (Debian: prometheus).
pub(crate) const PROMTOOL: &str = "LBD_REQUIRE_PROMTOOL";
/// systemd, and a machine in which root can boot it and has cgroups of version 2.
pub(crate) const SYSTEMD: &str = "LBD_REQUIRE_SYSTEMD";

/// The right to make a network of one's own, and to limit its ports.
pub(crate) const NETWORKS: &str = "LBD_REQUIRE_NETWORKS";

/// The Debian package, and the programs that packages are for: man, shells, lintian.
pub(crate) const PACKAGING: &str = "LBD_REQUIRE_PACKAGING";

/// Programs that people run under lbd: node, npm, python3, gunicorn, php.
pub(crate) const APPS: &str = "LBD_REQUIRE_APPS";

/// Root, who alone can act as two users.
pub(crate) const ROOT: &str = "LBD_REQUIRE_ROOT";

/// Whether this is root.
pub(crate) fn is_root() -> bool {
    let is = nix::unistd::geteuid().is_root();
    if !is {
        missing(ROOT, "only root can act as two users");
    }
    is
}

/// Whether `program`, of Debian's `package`, is here.
pub(crate) fn has(variable: &str, program: &str, package: &str) -> bool {
    let found = Command::new("sh").args(["-c", "command -v \"$0\"", program]).output();
    let found = found.is_ok_and(|output| output.status.success());
    if !found {
        missing(variable, format_args!("there is no {program} (Debian: {package})"));
    }
    found
}

/// Says that a test is not done for the lack of what `variable` stands for.
pub(crate) fn missing(variable: &str, why: impl Display) {
    let required = env::var_os(variable).is_some_and(|value| !value.is_empty());
    assert!(!required, "{variable} is set, but {why}");
    eprintln!("NOT TESTED: {why}");
}
