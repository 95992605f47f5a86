//! Steering by a classic BPF program, which needs no privilege: each connection goes to a random
//! healthy socket.
//!
//! `SO_ATTACH_REUSEPORT_CBPF` (socket(7)) needs no privilege. The program has no memory, so it can
//! neither rotate nor count: it draws a random number for each connection. Everything it knows is a
//! constant in its code, and it is attached again as a whole whenever something changes.
//!
//! It returns an index into the kernel's list of the group, which is mirrored here: a socket joins
//! at the end of the list, and when one leaves, the last one moves to its index
//! (`__reuseport_detach_sock`, net/core/sock_reuseport.c).

use std::{
    io,
    net::{IpAddr, Shutdown, SocketAddr},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::libc::{self, sock_filter};
use socket2::Socket;

use super::{
    ebpf::detach,
    steer::Steer,
    turns::{Choice, FALLBACK, FOLD, Key, LAST, STEPS, Turn, buckets, words},
};
use crate::net::steer::{NETWORK_HEADER, attach, instruction, load_source_port};

/// The number of buckets that clients are hashed to. Each takes two instructions, of the 4,096 that
/// a program may have.
const BUCKETS: u32 = 512;

/// Not an offset in the packet, but a random number (`SKF_AD_RANDOM`).
const RANDOM: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM) as u32;

/// A `SO_REUSEPORT` group and its classic BPF program.
#[derive(Debug)]
pub(super) struct Classic {
    inside: IpAddr,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// A copy of lbd's socket, until the end. A program that is attached to one socket applies to
    /// its group.
    fallback: Option<Socket>,
    /// In the kernel's order.
    members: Vec<Key>,
    choice: Choice,
    turns: Vec<Turn>,
    exceptions: Vec<(u16, Key)>,
}

impl Classic {
    /// Takes over the group that `fallback` is in, as its first member. `inside` is the address at
    /// which lbd itself reaches it.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub(super) fn start(fallback: &Socket, inside: SocketAddr) -> io::Result<Self> {
        let state = State {
            fallback: Some(fallback.try_clone()?),
            members: vec![FALLBACK],
            choice: Choice::Rotation,
            turns: Vec::new(),
            exceptions: Vec::new(),
        };
        let classic = Self { inside: inside.ip(), state: Mutex::new(state) };
        classic.attach(&classic.state())?;
        Ok(classic)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attach(&self, state: &State) -> io::Result<()> {
        let mut program = state.program(self.inside);
        if program.len() > libc::BPF_MAXINSNS as usize {
            return Err(io::Error::other("too many workers for a classic BPF program"));
        }
        match &state.fallback {
            Some(fallback) => attach(fallback, &mut program),
            None => Ok(()),
        }
    }
}

impl Steer for Classic {
    fn join(&self, key: Key, _socket: &Socket) -> io::Result<()> {
        self.state().members.push(key);
        Ok(())
    }

    fn leave(&self, key: Key, socket: &Socket) {
        let mut state = self.state();
        let Some(index) = state.members.iter().position(|member| *member == key) else { return };
        // The program has to be right both before and after the last socket moves to the freed
        // index. So for a moment the last socket has no turn either.
        let last = state.members.last().copied();
        state.exceptions.retain(|(_, to)| *to != key);
        let mut turns = state.turns.clone();
        turns.retain(|turn| turn.key != key);
        state.turns = turns.clone();
        state.turns.retain(|turn| Some(turn.key) != last);
        // This fails only for lack of memory. Then the socket stays in the group, without a turn.
        if self.attach(&state).is_ok() {
            // A close is not enough: a child that was just forked has a copy of the socket until
            // its execve.
            _ = socket.shutdown(Shutdown::Read);
            state.members.swap_remove(index);
        }
        state.turns = turns;
        _ = self.attach(&state);
    }

    fn moves(&self) -> bool {
        false
    }

    fn rotate(&self, choice: Choice, turns: &[Turn]) -> io::Result<()> {
        let mut state = self.state();
        let before = (state.choice, std::mem::replace(&mut state.turns, turns.to_vec()));
        state.choice = choice;
        self.attach(&state).inspect_err(|_| (state.choice, state.turns) = before)
    }

    fn except(&self, source: u16, key: Key) -> io::Result<()> {
        let mut state = self.state();
        state.exceptions.push((source, key));
        self.attach(&state).inspect_err(|_| _ = state.exceptions.pop())
    }

    fn except_no_more(&self, source: u16) {
        let mut state = self.state();
        state.exceptions.retain(|(other, _)| *other != source);
        // If this fails, a superfluous exception stays in force, for a port that is not in use.
        _ = self.attach(&state);
    }

    fn close(&self) -> bool {
        // The program can't refuse: for an index that is out of range, the kernel chooses a socket
        // by a hash.
        _ = self.rotate(Choice::Rotation, &[]);
        false
    }

    fn renew(&self, _fallback: &Socket) -> io::Result<()> {
        self.attach(&self.state())
    }

    fn except_renews(&self) -> bool {
        true
    }

    fn end(&self, fallback: &Socket) {
        // The copy is dropped before the program is detached: after that, a `PinGuard` that is
        // dropped attaches no program again.
        self.state().fallback = None;
        detach(fallback);
    }

    fn routed(&self, _key: Key) -> Option<u64> {
        None
    }
}

impl State {
    fn program(&self, inside: IpAddr) -> Vec<sock_filter> {
        let mut program = Vec::new();
        self.push_exceptions(&mut program, inside);
        let keys = match self.choice {
            Choice::Rotation => self.turns.iter().map(|turn| turn.key).collect(),
            Choice::SourceHash => buckets(&self.turns, BUCKETS),
        };
        let indices: Vec<u32> = keys.iter().filter_map(|key| self.index(*key)).collect();
        let [others @ .., last] = &indices[..] else {
            program.push(answer(0));
            return program;
        };
        if !others.is_empty() {
            match self.choice {
                Choice::Rotation => program.push(load_word(RANDOM)),
                Choice::SourceHash => push_hash(&mut program, inside),
            }
            program.push(alu(libc::BPF_MOD, indices.len() as u32));
        }
        for (turn, index) in (0..).zip(others) {
            program.extend([unless_equal(turn, 1), answer(*index)]);
        }
        program.push(answer(*last));
        program
    }

    /// Adds the exceptions: a connection of lbd itself goes to the socket that it is meant for.
    fn push_exceptions(&self, program: &mut Vec<sock_filter>, inside: IpAddr) {
        let known: Vec<(u16, u32)> = self
            .exceptions
            .iter()
            .filter_map(|(source, key)| Some((*source, self.index(*key)?)))
            .collect();
        if known.is_empty() {
            return;
        }
        let mut check = load_source_port(inside);
        for (source, index) in known {
            check.extend([unless_equal(source.into(), 1), answer(index)]);
        }
        // A remote client may have the same source port, so the source address has to be lbd's.
        let length = check.len() as u32;
        let words = words(inside);
        for (at, word) in (0..).zip(&words) {
            let left = words.len() as u32 - 1 - at;
            program.extend([
                load_word(source_address(inside).wrapping_add(4 * at)),
                instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, 0, *word),
                // Jumps past the other words and the check.
                instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, 3 * left + length),
            ]);
        }
        program.extend(check);
    }

    fn index(&self, key: Key) -> Option<u32> {
        self.members.iter().position(|member| *member == key).map(|index| index as u32)
    }
}

/// a = the client's hash, as in [`turns`](super::turns).
fn push_hash(program: &mut Vec<sock_filter>, family: IpAddr) {
    for at in 0..words(family).len() as u32 {
        if at > 0 {
            // x = a * FOLD
            program.extend([
                alu(libc::BPF_MUL, FOLD),
                instruction(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0),
            ]);
        }
        program.push(load_word(source_address(family).wrapping_add(4 * at)));
        if at > 0 {
            program.push(xor_x());
        }
    }
    let mut shift_and_xor = |shift, factor: Option<u32>| {
        program.extend([
            instruction(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0),
            alu(libc::BPF_RSH, shift),
            xor_x(),
        ]);
        program.extend(factor.map(|factor| alu(libc::BPF_MUL, factor)));
    };
    for (shift, factor) in STEPS {
        shift_and_xor(shift, Some(factor));
    }
    shift_and_xor(LAST, None);
}

/// The offset of a packet's source address (RFC 791, section 3.1; RFC 8200, section 3).
fn source_address(family: IpAddr) -> u32 {
    NETWORK_HEADER.wrapping_add(if family.is_ipv4() { 12 } else { 8 })
}

/// a = the word at `offset`.
fn load_word(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

/// a = a OP number
fn alu(operation: u32, number: u32) -> sock_filter {
    instruction(libc::BPF_ALU | operation | libc::BPF_K, 0, 0, number)
}

/// a = a ^ x
fn xor_x() -> sock_filter {
    instruction(libc::BPF_ALU | libc::BPF_XOR | libc::BPF_X, 0, 0, 0)
}

/// Skips `count` instructions unless a == number.
fn unless_equal(number: u32, count: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, count, number)
}

/// Returns the index of a socket.
fn answer(index: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, index)
}
