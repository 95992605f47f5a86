//! The `lbd` binary: either the template that guards are forked from (`lbd exec`), or a command of
//! the user's.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Checked before anything else is set up: each worker's guard is a copy of this process and
    // should cost as little as possible.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "exec") {
        return lbd::process::exec_main();
    }
    lbd::cli::main()
}
