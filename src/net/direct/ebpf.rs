//! Steering by an eBPF program: strict rotation, counted, and changed with one store.
//!
//! The program runs for the SYN of each new connection (`BPF_PROG_TYPE_SK_REUSEPORT`). When a
//! socket leaves the group, it also runs for each connection in that socket's accept queue
//! (`BPF_SK_REUSEPORT_SELECT_OR_MIGRATE`, Linux 5.14): the kernel moves the connection, with the
//! bytes that it has received, to the queue of the socket that the program then selects. Loading
//! the program needs `CAP_BPF`; nothing afterwards does.

use std::{
    io,
    mem::offset_of,
    net::{IpAddr, Shutdown, SocketAddr},
    os::fd::{AsFd, AsRawFd},
    sync::{
        Mutex, PoisonError,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::setsockopt;
use socket2::Socket;

use super::{
    assembler::{
        Arithmetic::{Add, And, Move, Multiply, Remainder, ShiftLeft, ShiftRight, Xor},
        Assembler,
        Condition::{Equal, Greater, NotEqual},
        Instruction,
        Register::{R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10},
        Size::{Byte, Double, Half, Word},
    },
    bpf::{Map, MapKind, Memory, Program, Refused, Shared},
    steer::Steer,
    turns::{Choice, FALLBACK, FOLD, Key, LAST, STEPS, Turn, buckets, words},
};
use crate::net::{
    options::{AttachReusePortEbpf, DetachReusePortBpf},
    rotation,
};

/// The most sockets in a group, including the fallback socket; a power of two.
pub(super) const KEYS: u32 = 4096;
/// The most turns in a rotation; a power of two. For source-hash, the number of buckets.
const TURNS: u32 = 4096;

/// The memory that is shared with the program. Fields that every connection reads are in another
/// cache line than those that every connection writes.
#[derive(Debug)]
#[repr(C)]
struct Table {
    /// The rotation: the number of turns in the upper half; in the lower half the index of the
    /// first turn in `keys`, and the flag [`HASHED`]. One store of this field puts another rotation
    /// in force.
    rotation: AtomicU64,
    /// The number of exceptions. If it is 0, the program does not look at source ports.
    exceptions: AtomicU64,
    _read: [AtomicU64; 6],
    /// The number of turns taken so far.
    cursor: AtomicU64,
    _written: [AtomicU64; 7],
    /// The number of connections that each key got.
    routed: [AtomicU64; KEYS as usize],
    /// Two tables of keys: one is in force while the other is written.
    keys: [AtomicU32; 2 * TURNS as usize],
}

// SAFETY: the fields are atomics, and arrays of them.
unsafe impl Shared for Table {}

/// Flag: turns are chosen by a hash of the client's address. The bit is above every index.
const HASHED: u32 = 1 << 30;
/// A rotation in which no socket has a turn, not even the fallback socket.
const CLOSED: u64 = HASHED as u64;
/// The offsets of the fields of [`Table`], for the program.
const ROTATION: usize = offset_of!(Table, rotation);
const EXCEPTIONS: usize = offset_of!(Table, exceptions);
const CURSOR: usize = offset_of!(Table, cursor);
const ROUTED: usize = offset_of!(Table, routed);
const TABLES: usize = offset_of!(Table, keys);

/// Numbers of kernel helpers (`linux/bpf.h`).
const MAP_LOOKUP: i32 = 1;
const LOAD_BYTES_RELATIVE: i32 = 68;
const SELECT_REUSEPORT: i32 = 82;
/// Argument of `LOAD_BYTES_RELATIVE`: offsets count from the network header.
const FROM_NETWORK_HEADER: i32 = 1;
/// The program's results: the selected socket gets the connection, or it is refused.
const PASS: i32 = 1;
const DROP: i32 = 0;
/// Offsets of fields in the program's context (`struct sk_reuseport_md`).
const DATA: i16 = 0;
const DATA_END: i16 = 8;
const MIGRATING_SOCKET: i16 = 48;
/// The remote address of a socket (`struct bpf_sock`).
const REMOTE_IP4: i16 = 52;
const REMOTE_IP6: i16 = 56;

/// On the program's stack: 1 for a connection that uses a turn, else 0.
const IS_NEW: i16 = -40;

/// How long to wait until a socket is free of the program that steered it before: the kernel
/// releases that program asynchronously.
const PATIENCE: Duration = Duration::from_secs(2);

/// A `SO_REUSEPORT` group and its eBPF program.
#[derive(Debug)]
pub(super) struct Ebpf {
    memory: Memory<Table>,
    sockets: Map,
    exceptions: Map,
    program: Program,
    /// The current rotation.
    turns: Mutex<Vec<Turn>>,
}

impl Ebpf {
    /// Takes over the group that `fallback` is in. `inside` is the address at which lbd itself
    /// reaches it.
    ///
    /// # Errors
    /// If the kernel refuses it: without `CAP_BPF`, or because it is too old.
    pub(super) fn start(fallback: &Socket, inside: SocketAddr) -> Result<Self, Refused> {
        let failed = |source| Refused { source, log: None };
        let memory = Memory::new("lbd_rotation");
        let memory = memory.map_err(failed)?;
        let sockets = Map::new(MapKind::Sockets, 4, KEYS, "lbd_sockets").map_err(failed)?;
        let exceptions = Map::new(MapKind::Hash, 4, KEYS, "lbd_exceptions").map_err(failed)?;
        let code = program(inside.ip(), &memory, &sockets, &exceptions);
        let program = Program::load(&code, "lbd_direct")?;
        // Detaches the program of the lbd that had this socket before.
        detach(fallback);
        let until = Instant::now() + PATIENCE;
        while let Err(error) = sockets.put(FALLBACK, fallback.as_raw_fd() as u32) {
            let busy = error.kind() == io::ErrorKind::ResourceBusy;
            if !busy || Instant::now() >= until {
                return Err(failed(error));
            }
            thread::sleep(Duration::from_millis(5));
        }
        attach(fallback, &program).map_err(failed)?;
        let turns = Mutex::default();
        Ok(Self { memory, sockets, exceptions, program, turns })
    }
}

impl Steer for Ebpf {
    fn join(&self, key: Key, socket: &Socket) -> io::Result<()> {
        self.sockets.put(key, socket.as_raw_fd() as u32)
    }

    fn leave(&self, _key: Key, socket: &Socket) {
        // A close is not enough: a child that was just forked has a copy of the socket until its
        // execve. On shutdown the kernel moves the queued connections, asking the program for each
        // one's target, and removes the socket from the map.
        _ = socket.shutdown(Shutdown::Read);
    }

    fn moves(&self) -> bool {
        true
    }

    fn rotate(&self, choice: Choice, turns: &[Turn]) -> io::Result<()> {
        if turns.len() > TURNS as usize {
            return Err(io::Error::other(format!("at most {TURNS} sockets can have turns")));
        }
        let mut current = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        let Table { rotation, cursor, keys: places, .. } = self.memory.get();
        let in_force = rotation.load(Relaxed) as u32 & !HASHED;
        let first = if in_force == 0 { TURNS } else { 0 };
        let (hashed, keys): (u32, Vec<Key>) = match choice {
            Choice::Rotation => (0, turns.iter().map(|turn| turn.key).collect()),
            Choice::SourceHash if turns.is_empty() => (0, Vec::new()),
            Choice::SourceHash => (HASHED, buckets(turns, TURNS)),
        };
        for (place, key) in places.iter().skip(first as usize).zip(&keys) {
            place.store(*key, Relaxed);
        }
        let places = |turns: &[Turn]| turns.iter().map(|turn| turn.place).collect::<Vec<_>>();
        let next = rotation::continued(cursor.load(Relaxed), &places(&current), &places(turns));
        // The table is written before `rotation`, which points to it.
        rotation.store((keys.len() as u64) << 32 | u64::from(first | hashed), Release);
        cursor.store(next, Relaxed);
        turns.clone_into(&mut current);
        Ok(())
    }

    fn except(&self, source: u16, key: Key) -> io::Result<()> {
        self.exceptions.put(source.into(), key)?;
        self.memory.get().exceptions.fetch_add(1, Release);
        Ok(())
    }

    fn except_no_more(&self, source: u16) {
        if self.exceptions.remove(source.into()).is_ok() {
            self.memory.get().exceptions.fetch_sub(1, Release);
        }
    }

    fn close(&self) -> bool {
        self.memory.get().rotation.store(CLOSED, Release);
        true
    }

    fn renew(&self, fallback: &Socket) -> io::Result<()> {
        attach(fallback, &self.program)
    }

    fn except_renews(&self) -> bool {
        false
    }

    fn end(&self, fallback: &Socket) {
        // Detach before removing the fallback socket from the map: otherwise the program would
        // refuse clients.
        detach(fallback);
        // A socket can be in only one such map, and this map lives as long as anyone still asks for
        // `routed` counts. Without this, no other program could steer the fallback socket.
        _ = self.sockets.remove(FALLBACK);
    }

    fn routed(&self, key: Key) -> Option<u64> {
        Some(self.memory.get().routed.get(key as usize)?.load(Acquire))
    }
}

/// Assembles the program of a group that lbd reaches at `inside`.
///
/// R6 is the program's context, R7 the shared memory, R9 the rotation.
fn program(
    inside: IpAddr,
    memory: &Memory<Table>,
    sockets: &Map,
    exceptions: &Map,
) -> Vec<Instruction> {
    let mut code = Assembler::default();
    let select = |code: &mut Assembler| {
        // R0 = select(context, sockets, &key, 0); the key is at the end of the stack.
        code.set(R1, R6);
        code.map(R2, sockets);
        code.set(R3, R10);
        code.alu(Add, R3, -4);
        code.set(R4, 0);
        code.call(SELECT_REUSEPORT);
    };
    code.set(R6, R1);
    code.map_value(R7, memory.map());

    // Is this a connection of lbd itself to one particular socket?
    code.load(Double, R1, R7, EXCEPTIONS as i16);
    code.jump_if(R1, Equal, 0, "turn");
    // The source port is the first field of the TCP header (RFC 9293, section 3.1). There is no
    // header when the kernel moves a queued connection.
    code.load(Double, R2, R6, DATA);
    code.load(Double, R3, R6, DATA_END);
    code.set(R4, R2);
    code.alu(Add, R4, 2);
    code.jump_if(R4, Greater, R3, "turn");
    code.load(Half, R8, R2, 0);
    code.network_to_number(R8, 16);
    // A remote client may have the same source port, so the source address has to be lbd's.
    load_source(&mut code, inside);
    code.jump_if(R0, NotEqual, 0, "turn");
    for (index, word) in words(inside).into_iter().enumerate() {
        code.load(Word, R1, R10, -32 + 4 * index as i16);
        code.network_to_number(R1, 32);
        code.jump32_if(R1, NotEqual, word as i32, "turn");
    }
    code.store(Word, R10, -4, R8);
    code.map(R1, exceptions);
    code.set(R2, R10);
    code.alu(Add, R2, -4);
    code.call(MAP_LOOKUP);
    code.jump_if(R0, Equal, 0, "turn");
    code.load(Word, R1, R0, 0);
    code.store(Word, R10, -4, R1);
    select(&mut code);
    // A pinned connection never goes to another socket.
    code.jump_if(R0, NotEqual, 0, "refuse");
    code.set(R0, PASS);
    code.exit();

    // Is this a new connection, or a queued one that moves? The kernel also runs the program for
    // segments that belong to no connection any more; those use no turn. Byte 13 has the flags: SYN
    // without ACK means new.
    code.label("turn");
    code.set(R1, 1);
    code.load(Double, R2, R6, DATA);
    code.load(Double, R3, R6, DATA_END);
    code.set(R4, R2);
    code.alu(Add, R4, 14);
    code.jump_if(R4, Greater, R3, "new");
    code.load(Byte, R4, R2, 13);
    code.alu(And, R4, 0x12);
    code.jump_if(R4, Equal, 0x02, "new");
    code.set(R1, 0);
    code.label("new");
    code.store(Double, R10, IS_NEW, R1);

    // Which turn is next? R8 becomes its index.
    code.load(Double, R9, R7, ROTATION as i16);
    code.set(R1, R9);
    code.alu(ShiftRight, R1, 32);
    code.jump_if(R1, Equal, 0, "nobody");
    code.jump32_if(R9, Greater, HASHED as i32 - 1, "hash");
    code.load(Double, R8, R10, IS_NEW);
    code.atomic_fetch_add(R7, CURSOR as i16, R8);
    code.jump("index");
    code.label("hash");
    hash(&mut code, inside);
    code.label("index");
    code.set(R2, R9);
    code.alu(ShiftRight, R2, 32);
    code.alu(Remainder, R8, R2);
    code.alu32(Move, R1, R9);
    code.alu(Add, R8, R1);
    // This mask proves to the verifier that the index is within both tables.
    code.alu(And, R8, 2 * TURNS as i32 - 1);
    code.alu(ShiftLeft, R8, 2);
    code.alu(Add, R8, R7);
    code.alu(Add, R8, TABLES as i32);
    code.load(Word, R8, R8, 0);
    code.store(Word, R10, -4, R8);
    select(&mut code);
    // The socket that has the turn may have left the group by the worker's own doing.
    code.jump_if(R0, NotEqual, 0, "park");
    code.alu(And, R8, KEYS as i32 - 1);
    code.alu(ShiftLeft, R8, 3);
    code.alu(Add, R8, R7);
    code.alu(Add, R8, ROUTED as i32);
    code.load(Double, R1, R10, IS_NEW);
    code.atomic_add(R8, 0, R1);
    code.set(R0, PASS);
    code.exit();

    code.label("nobody");
    code.jump32_if(R9, Equal, CLOSED as i32, "refuse");
    code.label("park");
    code.set(R1, FALLBACK as i32);
    code.store(Word, R10, -4, R1);
    select(&mut code);
    // Without a selection the kernel would choose any socket by a hash.
    code.jump_if(R0, NotEqual, 0, "refuse");
    code.set(R0, PASS);
    code.exit();

    code.label("refuse");
    code.set(R0, DROP);
    code.exit();
    code.finish()
}

/// Copies the client's address to the stack, from 32 bytes below its end on; R0 becomes 0.
fn load_source(code: &mut Assembler, family: IpAddr) {
    // The source address in the IP header (RFC 791, section 3.1; RFC 8200, section 3).
    let (offset, length) = if family.is_ipv4() { (12, 4) } else { (8, 16) };
    code.set(R1, R6);
    code.set(R2, offset);
    code.set(R3, R10);
    code.alu(Add, R3, -32);
    code.set(R4, length);
    code.set(R5, FROM_NETWORK_HEADER);
    code.call(LOAD_BYTES_RELATIVE);
}

/// R8 = the client's hash, as in [`turns`](super::turns).
fn hash(code: &mut Assembler, family: IpAddr) {
    let words = words(family).len() as i16;
    load_source(code, family);
    code.jump_if(R0, Equal, 0, "source");
    // A queued connection that moves has no packet, but it has a socket.
    code.load(Double, R1, R6, MIGRATING_SOCKET);
    code.jump_if(R1, Equal, 0, "park");
    let remote = if family.is_ipv4() { REMOTE_IP4 } else { REMOTE_IP6 };
    for index in 0..words {
        code.load(Word, R2, R1, remote + 4 * index);
        code.store(Word, R10, -32 + 4 * index, R2);
    }
    code.label("source");
    for index in 0..words {
        code.load(Word, R1, R10, -32 + 4 * index);
        code.network_to_number(R1, 32);
        if index == 0 {
            code.alu32(Move, R8, R1);
        } else {
            code.alu32(Multiply, R8, FOLD as i32);
            code.alu32(Xor, R8, R1);
        }
    }
    for (shift, factor) in STEPS {
        code.alu32(Move, R1, R8);
        code.alu32(ShiftRight, R1, shift as i32);
        code.alu32(Xor, R8, R1);
        code.alu32(Multiply, R8, factor as i32);
    }
    code.alu32(Move, R1, R8);
    code.alu32(ShiftRight, R1, LAST as i32);
    code.alu32(Xor, R8, R1);
}

fn attach(member: &Socket, program: &Program) -> io::Result<()> {
    Ok(setsockopt(member, AttachReusePortEbpf, &program.as_fd().as_raw_fd())?)
}

/// Detaches the program that steers the group that `member` is in, if there is one.
pub(super) fn detach(member: &Socket) {
    _ = setsockopt(member, DetachReusePortBpf, &0);
}
