//! Tracing one function of a guest, which hardware cannot do: a page of code is flagged, KVM_RUN
//! ends before anything there executes, and the code is stepped through with an observer until
//! control leaves it. The rest of the guest runs at full speed.
//!
//! `cargo run -p eptide-kvm --example execution_traps`

use std::error::Error;

use eptide_kvm::{CpuState, KVM_EXIT_EMULATE, Kvm, Observer, VcpuExit};
use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const SIZE: usize = 0x4000;
const CALLER: u64 = 0x1000;
const FUNCTION: u64 = 0x2000;
const CALLER_CODE: [u8; 7] = [
    0xb8, 5, 0, // mov ax, 5
    0xe8, 0xfa, 0x0f, // call FUNCTION
    0xf4, // hlt
];
const FUNCTION_CODE: [u8; 6] = [
    0x01, 0xc0, // add ax, ax
    0xa3, 0x00, 0x30, // mov [0x3000], ax
    0xc3, // ret
];

/// Writes down what the function does.
#[derive(Default)]
struct Trace(Vec<String>);

impl Observer for Trace {
    fn instruction(&mut self, state: &CpuState, bytes: &[u8]) {
        self.0.push(format!("{:x}: {bytes:02x?}", state.rip));
    }
    fn memory(&mut self, gva: u64, data: &[u8], write: bool) {
        let what = if write { "writes" } else { "reads" };
        self.0.push(format!("  {what} {data:02x?} at {gva:x}"));
    }
    fn branch(&mut self, _from: u64, to: u64) {
        self.0.push(format!("  goes to {to:x}"));
    }
}

/// Runs the guest.
pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), SIZE)])?;
    memory.write_slice(&CALLER_CODE, GuestAddress(CALLER))?;
    memory.write_slice(&FUNCTION_CODE, GuestAddress(FUNCTION))?;

    let vm = Kvm::new()?.create_vm()?;
    let region = kvm_userspace_memory_region {
        memory_size: SIZE as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
        ..Default::default()
    };
    // SAFETY: `memory` lives as long as the VM.
    unsafe { vm.set_user_memory_region(region)? };
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rsp, regs.rflags) = (CALLER, 0x1000, 2);
    vcpu.set_regs(&regs)?;

    vm.set_execution_traps(FUNCTION >> 12, 1, true)?;
    match vcpu.run()? {
        VcpuExit::Unsupported(KVM_EXIT_EMULATE) => {}
        other => return Err(format!("unexpected: {other:?}").into()),
    }
    assert_eq!(vcpu.emulate_exit().gpa, FUNCTION);

    let mut trace = Trace::default();
    while vcpu.get_regs()?.rip >> 12 == FUNCTION >> 12 {
        if let Some(exit) = vcpu.step(&mut trace)? {
            return Err(format!("unexpected: {exit:?}").into());
        }
    }
    println!("{}", trace.0.join("\n"));
    let expected = [
        "2000: [01, c0]",
        "2002: [a3, 00, 30]",
        "  writes [0a, 00] at 3000",
        "2005: [c3]",
        "  reads [06, 10] at ffe",
        "  goes to 1006",
    ];
    assert_eq!(trace.0, expected);
    assert!(matches!(vcpu.run()?, VcpuExit::Hlt));
    Ok(())
}
