//! A small assembler for the kernel's eBPF virtual machine, so that the program can be read as
//! code.
//!
//! The encoding is that of the kernel's Documentation/bpf/standardization/instruction-set.rst: an
//! opcode, two registers, an offset and a 32-bit number. A 64-bit number takes two instructions.

use std::os::fd::{AsFd, AsRawFd};

/// One instruction, as the kernel reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Instruction {
    operation: u8,
    /// The destination register in the lower half, the source register in the upper half.
    registers: u8,
    offset: i16,
    number: i32,
}

/// Registers. A call takes its arguments in R1 to R5, which it may overwrite, and returns in R0. R6
/// to R9 are preserved. R10 is the frame pointer: the end of the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10 = 10,
}

/// How many bytes are loaded or stored.
#[derive(Debug, Clone, Copy)]
pub(super) enum Size {
    Word = 0x00,
    Half = 0x08,
    Byte = 0x10,
    Double = 0x18,
}

/// An arithmetic operation.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arithmetic {
    Add = 0x00,
    Multiply = 0x20,
    And = 0x50,
    ShiftLeft = 0x60,
    ShiftRight = 0x70,
    Remainder = 0x90,
    Xor = 0xa0,
    Move = 0xb0,
}

/// The condition of a jump.
#[derive(Debug, Clone, Copy)]
pub(super) enum Condition {
    Equal = 0x10,
    Greater = 0x20,
    NotEqual = 0x50,
}

/// The second operand of an operation.
#[derive(Debug, Clone, Copy)]
pub(super) enum Operand {
    Register(Register),
    Number(i32),
}

impl From<Register> for Operand {
    fn from(register: Register) -> Self {
        Self::Register(register)
    }
}

impl From<i32> for Operand {
    fn from(number: i32) -> Self {
        Self::Number(number)
    }
}

const CLASS_LOAD: u8 = 0x00;
const CLASS_LOAD_MEMORY: u8 = 0x01;
const CLASS_STORE_REGISTER: u8 = 0x03;
const CLASS_ALU32: u8 = 0x04;
const CLASS_JUMP: u8 = 0x05;
const CLASS_JUMP32: u8 = 0x06;
const CLASS_ALU64: u8 = 0x07;
const MODE_MEMORY: u8 = 0x60;
const MODE_ATOMIC: u8 = 0xc0;
const SOURCE_REGISTER: u8 = 0x08;
const ATOMIC_ADD: i32 = 0x00;
const ATOMIC_FETCH: i32 = 0x01;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;
const BYTE_SWAP: u8 = 0xd0;
/// The conversion from big endian is the same.
const TO_BIG_ENDIAN: u8 = 0x08;
/// The kinds of numbers that a 64-bit load can refer to.
const PSEUDO_MAP: u8 = 1;
const PSEUDO_MAP_VALUE: u8 = 2;

/// A program that is being assembled. Jumps only go forward, to labels.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    instructions: Vec<Instruction>,
    /// Jumps whose label has not been defined yet: their index, and the label.
    jumps: Vec<(usize, &'static str)>,
}

impl Assembler {
    /// `to = to OP with`, in 64 bits.
    pub(super) fn alu(&mut self, op: Arithmetic, to: Register, with: impl Into<Operand>) {
        self.with_operand(CLASS_ALU64 | op as u8, to, 0, with.into());
    }

    /// `to = to OP with`, in 32 bits; the upper half becomes zero.
    pub(super) fn alu32(&mut self, op: Arithmetic, to: Register, with: impl Into<Operand>) {
        self.with_operand(CLASS_ALU32 | op as u8, to, 0, with.into());
    }

    /// `to = from`.
    pub(super) fn set(&mut self, to: Register, from: impl Into<Operand>) {
        self.alu(Arithmetic::Move, to, from);
    }

    /// Converts the lowest 16 or 32 bits of `register` from network byte order; the other bits
    /// become zero.
    pub(super) fn network_to_number(&mut self, register: Register, bits: i32) {
        self.push(CLASS_ALU32 | BYTE_SWAP | TO_BIG_ENDIAN, register, Register::R0, 0, bits);
    }

    /// `to = *(from + offset)`.
    pub(super) fn load(&mut self, size: Size, to: Register, from: Register, offset: i16) {
        self.push(CLASS_LOAD_MEMORY | MODE_MEMORY | size as u8, to, from, offset, 0);
    }

    /// `*(to + offset) = from`.
    pub(super) fn store(&mut self, size: Size, to: Register, offset: i16, from: Register) {
        self.push(CLASS_STORE_REGISTER | MODE_MEMORY | size as u8, to, from, offset, 0);
    }

    /// `*(to + offset) += add`, atomically, in 64 bits.
    pub(super) fn atomic_add(&mut self, to: Register, offset: i16, add: Register) {
        let operation = CLASS_STORE_REGISTER | MODE_ATOMIC | Size::Double as u8;
        self.push(operation, to, add, offset, ATOMIC_ADD);
    }

    /// The same, and `add` becomes the previous value.
    pub(super) fn atomic_fetch_add(&mut self, to: Register, offset: i16, add: Register) {
        let operation = CLASS_STORE_REGISTER | MODE_ATOMIC | Size::Double as u8;
        self.push(operation, to, add, offset, ATOMIC_ADD | ATOMIC_FETCH);
    }

    /// `to = the map`.
    pub(super) fn map(&mut self, to: Register, map: impl AsFd) {
        self.wide(to, PSEUDO_MAP, map.as_fd().as_raw_fd());
    }

    /// `to = the address of the map's one value`.
    pub(super) fn map_value(&mut self, to: Register, map: impl AsFd) {
        self.wide(to, PSEUDO_MAP_VALUE, map.as_fd().as_raw_fd());
    }

    /// Calls a kernel helper, by its number in `linux/bpf.h`.
    pub(super) fn call(&mut self, helper: i32) {
        self.push(CLASS_JUMP | CALL, Register::R0, Register::R0, 0, helper);
    }

    /// Returns the value of R0.
    pub(super) fn exit(&mut self) {
        self.push(CLASS_JUMP | EXIT, Register::R0, Register::R0, 0, 0);
    }

    /// Jumps to `label` if `left CONDITION right`, in 64 bits.
    pub(super) fn jump_if(
        &mut self,
        left: Register,
        condition: Condition,
        right: impl Into<Operand>,
        label: &'static str,
    ) {
        self.jumps.push((self.instructions.len(), label));
        self.with_operand(CLASS_JUMP | condition as u8, left, 0, right.into());
    }

    /// The same in 32 bits.
    pub(super) fn jump32_if(
        &mut self,
        left: Register,
        condition: Condition,
        right: impl Into<Operand>,
        label: &'static str,
    ) {
        self.jumps.push((self.instructions.len(), label));
        self.with_operand(CLASS_JUMP32 | condition as u8, left, 0, right.into());
    }

    /// Jumps to `label`.
    pub(super) fn jump(&mut self, label: &'static str) {
        self.jumps.push((self.instructions.len(), label));
        self.push(CLASS_JUMP, Register::R0, Register::R0, 0, 0);
    }

    /// Defines `label` here, as the target of the jumps to it so far.
    pub(super) fn label(&mut self, label: &'static str) {
        let here = self.instructions.len();
        self.jumps.retain(|&(from, wanted)| {
            if wanted == label {
                // Counted from the instruction after the jump.
                self.instructions[from].offset = (here - from - 1) as i16;
            }
            wanted != label
        });
    }

    /// The finished program. A jump whose label is missing would go to the next instruction.
    pub(super) fn finish(self) -> Vec<Instruction> {
        debug_assert!(self.jumps.is_empty(), "no label for {:?}", self.jumps);
        self.instructions
    }

    fn with_operand(&mut self, operation: u8, to: Register, offset: i16, operand: Operand) {
        match operand {
            Operand::Register(from) => {
                self.push(operation | SOURCE_REGISTER, to, from, offset, 0);
            }
            Operand::Number(number) => self.push(operation, to, Register::R0, offset, number),
        }
    }

    fn wide(&mut self, to: Register, kind: u8, number: i32) {
        let operation = CLASS_LOAD | Size::Double as u8;
        let registers = to as u8 | kind << 4;
        let second = Instruction { operation: 0, registers: 0, offset: 0, number: 0 };
        self.instructions.extend([Instruction { operation, registers, offset: 0, number }, second]);
    }

    fn push(&mut self, operation: u8, to: Register, from: Register, offset: i16, number: i32) {
        let registers = to as u8 | (from as u8) << 4;
        self.instructions.push(Instruction { operation, registers, offset, number });
    }
}
