//! What a test needs and not every machine has.
//!
//! Where it is missing, the test says so and does nothing else; but fails where `.ci/run`, which
//! installs it, has set the variable that is named for it.

use std::{env, fmt::Display};

/// `promtool` (Debian: prometheus).
pub(crate) const PROMTOOL: &str = "LBD_REQUIRE_PROMTOOL";
/// systemd, and a machine in which root can boot it and has cgroups of version 2.
pub(crate) const SYSTEMD: &str = "LBD_REQUIRE_SYSTEMD";

/// Says that a test is not done for the lack of what `variable` stands for.
pub(crate) fn missing(variable: &str, why: impl Display) {
    let required = env::var_os(variable).is_some_and(|value| !value.is_empty());
    assert!(!required, "{variable} is set, but {why}");
    eprintln!("NOT TESTED: {why}");
}
