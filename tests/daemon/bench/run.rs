//! `bench/run`, the comparison with other balancers: that it works at all, with lbd alone.

use std::{
    path::Path,
    process::{Command, Output},
};

fn run(arguments: &[&str]) -> Option<Output> {
    for program in ["python3", "wrk"] {
        if Command::new(program).arg("-v").output().is_err() {
            eprintln!("{program} is not installed: nothing to do");
            return None;
        }
    }
    let lbd = Path::new(env!("CARGO_BIN_EXE_lbd"));
    let worker = lbd.with_file_name("examples/memory_server");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/run");
    let mut command = Command::new(script);
    command.args(arguments).arg("--lbd").arg(lbd).arg("--worker").arg(worker);
    Some(command.output().unwrap())
}

#[test]
fn one_round_of_one_workload_gives_a_table() {
    let arguments = ["new-connections", "--only", "lbd", "--rounds", "1", "--seconds", "1"];
    let Some(output) = run(&arguments) else { return };
    let (text, said) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}{said}");
    assert!(text.contains("\n- lbd: lbd "), "{text}");
    assert!(text.contains("\n|  | requests/s | CPU µs/request | CPU in all |\n"), "{text}");
    let row = text.lines().find_map(|line| line.strip_prefix("| lbd | ")).expect(&text);
    let cells: Vec<f64> = row
        .trim_end_matches(" |")
        .split(" | ")
        .map(|cell| cell.replace(',', "").parse().expect(row))
        .collect();
    let [rate, cpu, in_all] = cells[..] else { panic!("{row}") };
    // Above what a stray or two would make, and two cores at most for each second.
    assert!(rate > 100.0 && cpu > 0.0 && in_all > cpu && rate * cpu < 8e6, "{row}");
}

#[test]
fn what_is_not_known_is_an_error() {
    for (arguments, expected) in [
        (&["no-such"][..], "no workload is called no-such"),
        (&["keep-alive", "--only", "lbd,apache"], "no contender is called apache"),
    ] {
        let Some(output) = run(arguments) else { return };
        assert!(!output.status.success() && output.stdout.is_empty());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(expected), "{said}");
    }
}
