//! A thread that does not run, among others of its process that do.

use std::{
    sync::mpsc,
    thread::{self, JoinHandle},
};

use nix::{
    sys::{
        ptrace,
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};

use super::PATIENCE;

/// Holds the thread up for as long as this is kept, or this process lives. What holds it up has to be
/// a tracer: a stopping signal stops the whole process.
pub(crate) struct Frozen {
    thaw: mpsc::Sender<()>,
    tracer: JoinHandle<()>,
}

impl Frozen {
    pub(crate) fn thread(tid: i32) -> Self {
        let tid = Pid::from_raw(tid);
        let (thaw, end) = mpsc::channel();
        let (report, frozen) = mpsc::channel();
        // Only the thread that attached may do the rest (ptrace(2)).
        let tracer = thread::spawn(move || {
            ptrace::seize(tid, ptrace::Options::empty()).unwrap();
            ptrace::interrupt(tid).unwrap();
            waitpid(tid, Some(WaitPidFlag::__WALL)).unwrap();
            report.send(()).unwrap();
            let _ = end.recv();
            // It may have been killed.
            let _ = ptrace::detach(tid, None);
        });
        frozen.recv_timeout(PATIENCE).unwrap();
        Self { thaw, tracer }
    }

    pub(crate) fn thaw(self) {
        drop(self.thaw);
        self.tracer.join().unwrap();
    }
}
