//! What `lbd check` would warn of, in the log of the daemon that runs the file all the same.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use tracing::warn;

use crate::config::{self, Config};

/// Whether a look is under way: accounts are looked up in it, which may take as long as it likes
/// (nsswitch.conf(5)).
static LOOKING: AtomicBool = AtomicBool::new(false);

/// Looks, on a thread of its own, whether all is there that `config` names, and says what is not.
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
    // Where there can be no thread there are other worries.
    if thread::Builder::new().name("warnings".to_owned()).spawn(look).is_err() {
        LOOKING.store(false, Ordering::Release);
    }
}
