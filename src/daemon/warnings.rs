//! Logs what `lbd check` would warn of, since the daemon runs the configuration all the same.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use tracing::warn;

use crate::config::{self, Config};

/// Whether a check is under way: it looks up accounts, which may take any time (nsswitch.conf(5)).
static LOOKING: AtomicBool = AtomicBool::new(false);

/// Checks on a thread of its own whether everything exists that `config` names, and logs what does
/// not.
pub(super) fn tell(config: &Config) {
    if LOOKING.swap(true, Ordering::AcqRel) {
        return;
    }
    let config = config.clone();
    let look = move || {
        for problem in config::warnings(&config) {
            let error = config::ConfigError { file: config.path.clone(), problems: vec![problem] };
            let error = error.one_line();
            warn!(error, "the configuration names what will not work yet");
        }
        LOOKING.store(false, Ordering::Release);
    };
    // Without a thread the check is skipped: the system then has worse problems.
    if thread::Builder::new().name("warnings".to_owned()).spawn(look).is_err() {
        LOOKING.store(false, Ordering::Release);
    }
}
