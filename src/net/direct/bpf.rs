//! The few calls of bpf(2) that steering needs: maps, one program, and memory shared with it.

use std::{
    ffi::c_void,
    io,
    marker::PhantomData,
    num::NonZeroUsize,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
};

use nix::{
    libc,
    sys::mman::{MapFlags, ProtFlags, mmap, munmap},
};

use super::assembler::Instruction;

/// Commands, flags and program types, from `linux/bpf.h`.
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE: libc::c_long = 2;
const MAP_DELETE: libc::c_long = 3;
const PROGRAM_LOAD: libc::c_long = 5;
const NO_PREALLOC: u32 = 1 << 0;
const MMAPABLE: u32 = 1 << 10;
const SK_REUSEPORT: u32 = 21;
const SK_REUSEPORT_SELECT_OR_MIGRATE: u32 = 40;

/// The size of the buffer for the verifier's log.
const LOG: usize = 64 * 1024;

/// The type of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MapKind {
    /// Numbers by number. Entries are allocated as they are inserted.
    Hash = 1,
    /// One value, which this process can map into its memory.
    Memory = 2,
    /// Listening sockets of one `SO_REUSEPORT` group, by number.
    Sockets = 20,
}

/// A map with keys of 4 bytes. The kernel keeps it as long as this or a program that uses it
/// exists.
#[derive(Debug)]
pub(super) struct Map(OwnedFd);

impl Map {
    /// # Errors
    /// `PermissionDenied` without `CAP_BPF`; `InvalidInput` if the kernel is too old.
    pub(super) fn new(
        kind: MapKind,
        value_size: u32,
        entries: u32,
        name: &str,
    ) -> io::Result<Self> {
        #[repr(C)]
        #[derive(Default)]
        struct Attributes {
            map_type: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
            map_flags: u32,
            inner_map_fd: u32,
            numa_node: u32,
            map_name: [u8; 16],
        }
        let attributes = Attributes {
            map_type: kind as u32,
            key_size: 4,
            value_size,
            max_entries: entries,
            map_flags: match kind {
                MapKind::Hash => NO_PREALLOC,
                MapKind::Memory => MMAPABLE,
                MapKind::Sockets => 0,
            },
            map_name: object_name(name),
            ..Attributes::default()
        };
        // SAFETY: `Attributes` is the head of the union that the kernel reads for this command, and
        // contains no pointer; the kernel treats the missing rest as zeros.
        unsafe { bpf_for_descriptor(MAP_CREATE, &attributes) }.map(Self)
    }

    /// Sets the value of `key`, whatever was there. In a map of sockets the value is a descriptor.
    ///
    /// # Errors
    /// `ResourceBusy` for a socket that is in another such map.
    pub(super) fn put(&self, key: u32, value: u32) -> io::Result<()> {
        // A map of sockets takes descriptors of 8 bytes too; those of 4 are the size of `value`.
        self.element(MAP_UPDATE, key, Some(value))
    }

    /// # Errors
    /// `NotFound` if there is no such key.
    pub(super) fn remove(&self, key: u32) -> io::Result<()> {
        self.element(MAP_DELETE, key, None)
    }

    fn element(&self, command: libc::c_long, key: u32, value: Option<u32>) -> io::Result<()> {
        #[repr(C)]
        struct Attributes {
            map_fd: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let address = |number: &u32| std::ptr::from_ref(number) as u64;
        let attributes = Attributes {
            map_fd: self.0.as_raw_fd() as u32,
            key: address(&key),
            value: value.as_ref().map_or(0, address),
            flags: 0,
        };
        // SAFETY: as above; key and value are the 4 bytes that every map here was made with, and
        // outlive the call, which keeps no pointer.
        unsafe { bpf(command, &attributes) }.map(drop)
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A type that can be shared with the program in a [`Memory`].
///
/// # Safety
/// The type consists only of atomics, so that all zeros are valid and both sides may write at any
/// time.
pub(super) unsafe trait Shared {}

/// A map of one value, which is mapped into this process: each side sees at once what the other
/// writes.
#[derive(Debug)]
pub(super) struct Memory<T: Shared> {
    map: Map,
    start: NonNull<c_void>,
    size: NonZeroUsize,
    what: PhantomData<T>,
}

// SAFETY: the mapping belongs to the process and is accessed only through atomics.
unsafe impl<T: Shared> Send for Memory<T> {}
// SAFETY: as above.
unsafe impl<T: Shared> Sync for Memory<T> {}

impl<T: Shared> Memory<T> {
    const SIZE: NonZeroUsize = NonZeroUsize::new(size_of::<T>()).unwrap();

    /// Creates it, filled with zeros.
    ///
    /// # Errors
    /// As [`Map::new`]; or if there is no memory.
    pub(super) fn new(name: &str) -> io::Result<Self> {
        let size = Self::SIZE;
        let map = Map::new(MapKind::Memory, size.get() as u32, 1, name)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses the address of the new mapping, so it replaces no other
        // mapping.
        let start = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &map, 0) }?;
        Ok(Self { map, start, size, what: PhantomData })
    }

    pub(super) fn map(&self) -> &Map {
        &self.map
    }

    pub(super) fn get(&self) -> &T {
        // SAFETY: the mapping is as large as a `T`, zeroed at first, lives as long as `self`, and begins
        // at a page. All access is atomic, on this side as on the program's.
        unsafe { self.start.cast().as_ref() }
    }
}

impl<T: Shared> Drop for Memory<T> {
    fn drop(&mut self) {
        // SAFETY: nothing borrows from it any more. It can't fail for a mapping that is whole.
        _ = unsafe { munmap(self.start, self.size.get()) };
    }
}

/// A loaded program that selects a socket of a group.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

/// Why the kernel refused a program.
#[derive(Debug, thiserror::Error)]
#[error("{source}{}", .log.as_ref().map(|log| format!(": {log}")).unwrap_or_default())]
pub(super) struct Refused {
    #[source]
    pub(super) source: io::Error,
    /// The last lines of the verifier's log, if the program got that far.
    pub(super) log: Option<String>,
}

impl Program {
    /// Makes the kernel verify and compile `instructions`. The program will also be run to find
    /// another socket for each queued connection when a socket leaves the group.
    ///
    /// # Errors
    /// [`Refused`], with the verifier's reason.
    pub(super) fn load(instructions: &[Instruction], name: &str) -> Result<Self, Refused> {
        #[repr(C)]
        #[derive(Default)]
        struct Attributes {
            prog_type: u32,
            insn_cnt: u32,
            insns: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log_buf: u64,
            kern_version: u32,
            prog_flags: u32,
            prog_name: [u8; 16],
            prog_ifindex: u32,
            expected_attach_type: u32,
        }
        let mut log = Vec::new();
        let attempt = |log: &mut Vec<u8>| {
            let attributes = Attributes {
                prog_type: SK_REUSEPORT,
                insn_cnt: instructions.len() as u32,
                insns: instructions.as_ptr() as u64,
                license: c"MIT".as_ptr() as u64,
                log_level: u32::from(!log.is_empty()),
                log_size: log.len() as u32,
                log_buf: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
                prog_name: object_name(name),
                expected_attach_type: SK_REUSEPORT_SELECT_OR_MIGRATE,
                ..Attributes::default()
            };
            // SAFETY: the instructions, the licence and the log outlive the call, their lengths are
            // given, and the kernel keeps no pointer to them.
            unsafe { bpf_for_descriptor(PROGRAM_LOAD, &attributes) }.map(Self)
        };
        let source = match attempt(&mut log) {
            Ok(program) => return Ok(program),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => error,
            // Once more, with a log that tells why.
            Err(_) => {
                log.resize(LOG, 0);
                match attempt(&mut log) {
                    Ok(program) => return Ok(program),
                    Err(error) => error,
                }
            }
        };
        Err(Refused { source, log: last_lines(&log) })
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The name that `bpftool` shows: at most 15 bytes of letters, digits, `_` and `.`.
fn object_name(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(15)) {
        *to = from;
    }
    bytes
}

fn last_lines(log: &[u8]) -> Option<String> {
    const LINES: usize = 8;
    let text = log.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(LINES)..].join("; ");
    (!last.is_empty()).then_some(last)
}

/// # Safety
/// As [`bpf`], for a command that answers with a descriptor.
unsafe fn bpf_for_descriptor<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attributes) }?;
    let fd = i32::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just created the descriptor, close-on-exec, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// `attributes` has the layout that the kernel reads for `command`, and whatever it points to is
/// there and as large as it says.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    let size = size_of::<T>();
    // SAFETY: the caller's promise; the size given is that of what is pointed to.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::{
        super::assembler::{Assembler, Register::R0},
        *,
    };

    #[test]
    fn a_refused_program_says_why() {
        let mut code = Assembler::default();
        code.exit();
        let refused = Program::load(&code.finish(), "lbd_test").unwrap_err();
        if refused.source.kind() == io::ErrorKind::PermissionDenied && refused.log.is_none() {
            return eprintln!("NOT TESTED: no CAP_BPF");
        }
        assert!(refused.to_string().contains("R0 !read_ok"), "{refused}");
        let mut code = Assembler::default();
        code.set(R0, 1);
        code.exit();
        Program::load(&code.finish(), "lbd_test").unwrap();
    }
}
