//! Prometheus' own judge of pages, expressions and rules.

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use super::needs::{PROMTOOL, missing};

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
            missing(PROMTOOL, format_args!("promtool (Debian: prometheus) does not run: {error}"));
            return None;
        }
    };
    promtool.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    assert!(output.status.success(), "promtool {arguments:?}: {said}");
    Some(said)
}
