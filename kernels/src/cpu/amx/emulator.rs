//! The tile instructions on processors without them: a handler of the signal that an unknown instruction raises decodes it, does its work on
//! tiles in memory, and goes on behind it. Tests thus run the assembly that machines with AMX run, at some microseconds an instruction.

use half::bf16;
use std::cell::RefCell;
use std::sync::OnceLock;

const ROWS: usize = 16;
const ROW_BYTES: usize = 64;

#[derive(Clone, Copy)]
struct TileRegister([[u8; ROW_BYTES]; ROWS]);

struct State {
    configured: bool,
    tiles: [TileRegister; 8],
}

thread_local! {
    static STATE: RefCell<State> = const { RefCell::new(State { configured: false, tiles: [TileRegister([[0; ROW_BYTES]; ROWS]); 8] }) };
}

/// Installs the handler; true if it stands.
pub(super) fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        // SAFETY: all fields of the structure may be zero; the handler has the signature that SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_unknown_instruction;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()) == 0
        }
    })
}

extern "C" fn on_unknown_instruction(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system hands the handler a valid context, which nobody else uses meanwhile.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize];
    // SAFETY: an instruction was fetched from there; the longest has 15 bytes, and code is followed by more of it.
    let bytes = unsafe { std::slice::from_raw_parts(at as *const u8, 15) };
    let done = Instruction::decode(bytes, registers).and_then(|instruction| {
        STATE.with_borrow_mut(|state| state.run(&instruction))?;
        Some(instruction.length)
    });
    match done {
        Some(length) => registers[libc::REG_RIP as usize] = at + length as i64,
        None => {
            eprintln!("not an instruction that the emulator knows: {bytes:02x?}");
            std::process::abort();
        }
    }
}

/// An instruction in the three-byte VEX form, map 2.
struct Instruction {
    opcode: u8,
    /// The implied prefix: none, 66, F3, F2.
    prefix: u8,
    reg: usize,
    vvvv: usize,
    operand: Operand,
    length: usize,
}

#[derive(Clone, Copy)]
enum Operand {
    Register(usize),
    /// The address of a row is `base + row · stride`.
    Memory {
        base: usize,
        stride: usize,
    },
}

impl Instruction {
    fn decode(bytes: &[u8], registers: &[i64]) -> Option<Self> {
        let [0xC4, first, second, opcode, modrm, ..] = *bytes else { return None };
        if first & 31 != 2 || second >> 7 != 0 || second & 4 != 0 {
            return None;
        }
        let extend = |bit: u8| usize::from(!first >> bit & 1) << 3;
        let (mode, rm) = (modrm >> 6, usize::from(modrm & 7));
        let mut length = 5;
        let operand = if mode == 3 {
            Operand::Register(rm | extend(5))
        } else {
            let (base, stride) = if rm == 4 {
                let sib = bytes[5];
                length += 1;
                let index = usize::from(sib >> 3 & 7) | extend(6);
                let stride = if index == 4 { 0 } else { general(registers, index) << (sib >> 6) };
                (usize::from(sib & 7) | extend(5), stride)
            } else {
                (rm | extend(5), 0)
            };
            if mode == 0 && base & 7 == 5 {
                return None;
            }
            let displacement = match mode {
                0 => 0,
                1 => bytes[length] as i8 as i64,
                _ => i32::from_le_bytes(*bytes[length..].first_chunk()?) as i64,
            };
            length += [0, 1, 4][usize::from(mode)];
            Operand::Memory { base: general(registers, base).wrapping_add_signed(displacement as isize), stride }
        };
        let (reg, vvvv) = (usize::from(modrm >> 3 & 7) | extend(7), usize::from(!second >> 3 & 15));
        Some(Self { opcode, prefix: second & 3, reg, vvvv, operand, length })
    }
}

/// The general register with the number that instructions give it.
fn general(registers: &[i64], number: usize) -> usize {
    use libc::{REG_R8, REG_RAX, REG_RBP, REG_RBX, REG_RCX, REG_RDI, REG_RDX, REG_RSI, REG_RSP};
    let low = [REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI];
    let at = if number < 8 { low[number] } else { REG_R8 + number as i32 - 8 };
    registers[at as usize] as usize
}

impl State {
    /// Does what an instruction says; `None` if it is not one of tiles, or not allowed.
    fn run(&mut self, i: &Instruction) -> Option<()> {
        const NONE: u8 = 0;
        const PF3: u8 = 2;
        const PF2: u8 = 3;
        match (i.opcode, i.prefix, i.operand) {
            (0x49, NONE, Operand::Memory { base, .. }) => return self.configure(base),
            (0x49, NONE, Operand::Register(0)) => {
                self.configured = false;
                return Some(());
            }
            _ if !self.configured => return None,
            (0x49, PF2, Operand::Register(0)) => *self.tiles.get_mut(i.reg)? = TileRegister([[0; ROW_BYTES]; ROWS]),
            (0x4B, PF2, Operand::Memory { base, stride }) => {
                let tile = self.tiles.get_mut(i.reg)?;
                for (r, row) in tile.0.iter_mut().enumerate() {
                    // SAFETY: the code under test vouches for the rows of its operand.
                    *row = unsafe { ((base + r * stride) as *const [u8; ROW_BYTES]).read_unaligned() };
                }
            }
            (0x4B, PF3, Operand::Memory { base, stride }) => {
                for (r, row) in self.tiles.get(i.reg)?.0.iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { ((base + r * stride) as *mut [u8; ROW_BYTES]).write_unaligned(*row) };
                }
            }
            (0x5C, PF3, Operand::Register(a)) => self.multiply(i.reg, a, i.vvvv, bf16_values, bf16_entry)?,
            (0x5E, PF2, Operand::Register(a)) => self.multiply(i.reg, a, i.vvvv, i8_values, i8_entry)?,
            _ => return None,
        }
        Some(())
    }

    /// Takes a configuration, which must be of eight full tiles.
    fn configure(&mut self, address: usize) -> Option<()> {
        // SAFETY: the code under test vouches for the 64 bytes.
        let config = unsafe { (address as *const [u8; 64]).read_unaligned() };
        let full = (0..8).all(|t| config[16 + 2 * t] == ROW_BYTES as u8 && config[17 + 2 * t] == 0 && config[48 + t] == ROWS as u8);
        let rest_is_zero = config[1..16].iter().chain(&config[32..48]).chain(&config[56..]).all(|&x| x == 0);
        if config[0] != 1 || !full || !rest_is_zero {
            return None;
        }
        self.configured = true;
        self.tiles = [TileRegister([[0; ROW_BYTES]; ROWS]); 8];
        Some(())
    }

    /// `sums[m][n] ← entry(sums[m][n], the 16 entries of row m of a, those of column n of b)`, each entry as the numbers that it holds.
    fn multiply<V: Copy>(
        &mut self,
        sums: usize,
        a: usize,
        b: usize,
        values: fn([u8; 4]) -> V,
        entry: fn([u8; 4], &Terms<V>) -> [u8; 4],
    ) -> Option<()> {
        let word = |row: &[u8; ROW_BYTES], i: usize| [row[4 * i], row[4 * i + 1], row[4 * i + 2], row[4 * i + 3]];
        let all = |tile: &TileRegister| tile.0.map(|row| std::array::from_fn::<V, 16, _>(|i| values(word(&row, i))));
        let (a, b) = (all(self.tiles.get(a)?), all(self.tiles.get(b)?));
        let sums = self.tiles.get_mut(sums)?;
        for (row, sums) in a.iter().zip(&mut sums.0) {
            for n in 0..16 {
                let terms = std::array::from_fn(|k| (row[k], b[k][n]));
                let sum = entry(word(sums, n), &terms);
                sums[4 * n..4 * n + 4].copy_from_slice(&sum);
            }
        }
        Some(())
    }
}

/// The entries of a row of A and a column of B.
type Terms<V> = [(V, V); 16];

/// Denormals count as zero.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

fn bf16_values(word: [u8; 4]) -> [f32; 2] {
    [[word[0], word[1]], [word[2], word[3]]].map(|half| flush(bf16::from_le_bytes(half).to_f32()))
}

/// TDPBF16PS: the even and the odd terms are summed apart, then together, then to the old sum; denormals count as zero throughout.
fn bf16_entry(old: [u8; 4], terms: &Terms<[f32; 2]>) -> [u8; 4] {
    let mut sums = [0f32; 2];
    for (a, b) in terms {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            // A product of two bf16 is exact, unless it is denormal or overflows. A fused one is a call where its instruction is not enabled.
            let product = a * b;
            let is_exact = product.is_normal() || *a == 0.0 || *b == 0.0;
            *sum = flush(if is_exact { product + *sum } else { a.mul_add(*b, *sum) });
        }
    }
    flush(flush(sums[0] + sums[1]) + flush(f32::from_le_bytes(old))).to_le_bytes()
}

fn i8_values(word: [u8; 4]) -> [i32; 4] {
    word.map(|x| x as i8 as i32)
}

/// TDPBSSD.
fn i8_entry(old: [u8; 4], terms: &Terms<[i32; 4]>) -> [u8; 4] {
    let product = |(a, b): &([i32; 4], [i32; 4])| a.iter().zip(b).map(|(a, b)| a * b).sum::<i32>();
    terms.iter().map(product).fold(i32::from_le_bytes(old), i32::wrapping_add).to_le_bytes()
}
