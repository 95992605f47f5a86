//! Programs of other people's that tests judge by.

use std::{env, process::Command};

/// Set where these programs have to be there, as in `.ci/run`.
const REQUIRED: &str = "LBD_REQUIRE_PACKAGING";

/// Whether `program`, of Debian's `package`, is here; if not, that is said.
pub(crate) fn has(program: &str, package: &str) -> bool {
    let found = Command::new("sh").args(["-c", "command -v \"$0\"", program]).output().unwrap();
    if !found.status.success() {
        missing(&format!("no {program} (Debian: {package})"));
    }
    found.status.success()
}

/// Says that something is not tested, which is a failure where it has to be.
pub(crate) fn missing(what: &str) {
    assert!(env::var_os(REQUIRED).is_none(), "{what}");
    eprintln!("NOT TESTED: {what}");
}
