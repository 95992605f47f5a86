//! Prometheus' own judge of pages, expressions and rules.

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

/// Set where `promtool` has to be there, as in `.ci/run`.
const REQUIRED: &str = "LBD_REQUIRE_PROMTOOL";

/// What `promtool` says with these arguments, in `folder`, to `input`; it must be content. `None`
/// where there is no `promtool`, which is then said.
pub(crate) fn promtool(folder: &Path, arguments: &[&str], input: &str) -> Option<String> {
    let promtool = Command::new("promtool")
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut promtool = match promtool {
        Ok(promtool) => promtool,
        Err(error) => {
            let required = std::env::var_os(REQUIRED).is_some();
            assert!(!required, "promtool (Debian: prometheus) does not run: {error}");
            eprintln!("NOT TESTED: no promtool (Debian: prometheus): {error}");
            return None;
        }
    };
    promtool.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    assert!(output.status.success(), "promtool {arguments:?}: {said}");
    Some(said)
}
