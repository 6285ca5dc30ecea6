//! The loops that are measured: position-independent leaf functions.

use std::arch::global_asm;

/// A loop as the host calls it.
pub type Native = extern "C" fn(u64, u64, u64) -> u64;

global_asm!(
    // u64 integer(rdi = count): adds, xors and shifts.
    ".balign 64",
    "eptide_bench_integer:",
    "xor eax, eax",
    "mov ecx, 0x9e3779b9",
    "2: add rax, rcx",
    "mov rdx, rax",
    "shr rdx, 7",
    "xor rax, rdx",
    "lea rcx, [rcx + rcx*4 + 3]",
    "dec rdi",
    "jnz 2b",
    "ret",
    "eptide_bench_integer_end:",
    // u64 crc(rdi = count, rsi = table of 256 u32, rdx = buffer of 4096 bytes)
    ".balign 64",
    "eptide_bench_crc:",
    "mov eax, 0xffffffff",
    "xor ecx, ecx",
    "2: mov r8, rcx",
    "and r8d, 4095",
    "movzx r8d, byte ptr [rdx + r8]",
    "movzx r9d, al",
    "xor r8d, r9d",
    "shr eax, 8",
    "xor eax, dword ptr [rsi + r8*4]",
    "inc rcx",
    "cmp rcx, rdi",
    "jb 2b",
    "ret",
    "eptide_bench_crc_end:",
    // u64 chase(rdi = count, rsi = list of offsets from its own start)
    ".balign 64",
    "eptide_bench_chase:",
    "xor eax, eax",
    "2: mov rax, [rsi + rax]",
    "dec rdi",
    "jnz 2b",
    "ret",
    "eptide_bench_chase_end:",
    // quicksort(rdi = first, rsi = last) of u32, by recursion.
    ".balign 64",
    "eptide_bench_quicksort:",
    "cmp rdi, rsi",
    "jae 9f",
    "mov rax, rdi",
    "mov rdx, rsi",
    "mov ecx, [rdi]",
    "3: cmp rax, rdx",
    "ja 6f",
    "4: cmp [rax], ecx",
    "jae 5f",
    "add rax, 4",
    "jmp 4b",
    "5: cmp [rdx], ecx",
    "jbe 7f",
    "sub rdx, 4",
    "jmp 5b",
    "7: cmp rax, rdx",
    "ja 6f",
    "mov r8d, [rax]",
    "mov r9d, [rdx]",
    "mov [rax], r9d",
    "mov [rdx], r8d",
    "add rax, 4",
    "sub rdx, 4",
    "jmp 3b",
    "6: push rax",
    "push rsi",
    "mov rsi, rdx",
    "call eptide_bench_quicksort",
    "pop rsi",
    "pop rdi",
    "jmp eptide_bench_quicksort",
    "9: ret",
    "eptide_bench_quicksort_end:",
);

macro_rules! loops {
    ($($name:ident $start:ident $end:ident)*) => {
        unsafe extern "C" {
            $(
                fn $start(a: u64, b: u64, c: u64) -> u64;
                static $end: u8;
            )*
        }

        /// Name, native function and machine code of every loop.
        pub fn all() -> Vec<(&'static str, Native, Vec<u8>)> {
            vec![$({
                let start = $start as *const () as usize;
                let len = (&raw const $end) as usize - start;
                // SAFETY: the bytes of the function, which the assembler laid out above; it
                // follows the C calling convention.
                unsafe {
                    let code = std::slice::from_raw_parts(start as *const u8, len).to_vec();
                    let run = std::mem::transmute::<usize, Native>(start);
                    (stringify!($name), run, code)
                }
            },)*]
        }
    };
}

loops! {
    integer eptide_bench_integer eptide_bench_integer_end
    crc eptide_bench_crc eptide_bench_crc_end
    chase eptide_bench_chase eptide_bench_chase_end
    quicksort eptide_bench_quicksort eptide_bench_quicksort_end
}
