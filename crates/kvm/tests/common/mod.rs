//! A machine for assembled guests, through the API that `kvm-ioctls` has too.
#![allow(dead_code, reason = "each test program uses its own part")]

mod raw;

use eptide_kvm as kvm;
pub(crate) use iced_x86::code_asm::*;
use kvm::{Kvm, VcpuExit, VcpuFd, VmFd};
use kvm_bindings::*;
#[allow(
    unused_imports,
    reason = "the crate under test has methods of these names"
)]
pub(crate) use raw::Raw;

/// The system object. In the test program `on_shadow_tables`, which holds the guest tests once more,
/// its VMs have no EPT.
pub(crate) fn system() -> Kvm {
    match env!("CARGO_CRATE_NAME") {
        "on_shadow_tables" => with_ept(false),
        _ => Kvm::new().unwrap(),
    }
}

/// What [`Kvm::with_options`] is in the test program `on_kvm_ioctls`, where `Kvm` has no options.
trait WithoutOptions: Sized {
    fn with_options(_options: kvm::Options) -> Kvm {
        Kvm::new().unwrap()
    }
}

impl WithoutOptions for Kvm {}

/// A system object whose VMs have EPT, or have not.
pub(crate) fn with_ept(ept: bool) -> Kvm {
    Kvm::with_options(kvm::Options::default().with_ept(ept))
}

/// KVM_ENABLE_CAP with one argument; the errno it fails with.
pub(crate) fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), i32> {
    let mut request = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    request.args[0] = argument;
    vm.enable_cap(&request).map_err(|error| error.errno())
}

/// Shared anonymous memory.
pub(crate) struct Memory {
    pub(crate) base: *mut u8,
    pub(crate) size: usize,
}

// SAFETY: plain memory; tests synchronise what they look at.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(crate) fn new(size: usize) -> Memory {
        // SAFETY: a new mapping at an address the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        Memory {
            base: base.cast(),
            size,
        }
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= self.size);
        // SAFETY: inside the mapping.
        unsafe {
            let to = self.base.add(at as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    pub(crate) fn write_u64(&self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    pub(crate) fn read_u64(&self, at: u64) -> u64 {
        assert!(at as usize + 8 <= self.size);
        // SAFETY: inside the mapping.
        unsafe { self.base.add(at as usize).cast::<u64>().read_volatile() }
    }

    pub(crate) fn region(&self, slot: u32, gpa: u64) -> kvm_userspace_memory_region {
        kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: self.size as u64,
            userspace_addr: self.base as u64,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made above.
        unsafe { libc::munmap(self.base.cast(), self.size) };
    }
}

/// Where code goes.
pub(crate) const CODE: u64 = 0x1000;
/// Where the stack starts.
pub(crate) const STACK: u64 = 0x8000;
/// Where the interrupt descriptor table is.
pub(crate) const IDT: u64 = 0x9000;
/// Where the global descriptor table is.
const GDT: u64 = 0xa000;
/// Where page tables begin.
pub(crate) const TABLES: u64 = 0x1_0000;
/// Bytes of memory at guest-physical 0.
pub(crate) const MEMORY: usize = 2 << 20;

/// A VM with memory at 0 and one vCPU in 64-bit mode at [`CODE`], the first GiB identity-mapped
/// with 2 MiB pages.
pub(crate) struct Machine {
    pub(crate) kvm: Kvm,
    pub(crate) vm: VmFd,
    pub(crate) vcpus: Vec<VcpuFd>,
    pub(crate) memory: Memory,
}

/// Assembles 64-bit code for [`CODE`].
pub(crate) fn assemble(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    assemble_at(CODE, build)
}

/// Assembles 64-bit code.
pub(crate) fn assemble_at(
    at: u64,
    build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// The local APIC's register page.
pub(crate) const APIC: i64 = 0xfee0_0000;

/// Points RBX at the local APIC and enables it.
pub(crate) fn enable_apic(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rbx, APIC)?;
    a.mov(dword_ptr(rbx + 0xf0), 0x1ff)
}

/// Leaves by a port write, so that it ends with and without an irqchip.
pub(crate) fn stop(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.out(0x80, al)
}

/// Runs the first vCPU until [`stop`].
pub(crate) fn runs_to_stop(machine: &mut Machine) {
    match machine.vcpu().run().unwrap() {
        VcpuExit::IoOut(0x80, _) => {}
        other => panic!("{other:?}"),
    }
}

/// Assembles 32-bit code.
pub(crate) fn assemble32(
    at: u32,
    build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(32).unwrap();
    build(&mut a).unwrap();
    a.assemble(at as u64).unwrap()
}

/// What controllers a machine has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Irqchip {
    None,
    Full,
    Split,
}

impl Machine {
    pub(crate) fn new(irqchip: Irqchip, vcpus: u64, code: &[u8]) -> Machine {
        Machine::new_in(system(), irqchip, vcpus, code)
    }

    pub(crate) fn new_in(kvm: Kvm, irqchip: Irqchip, vcpus: u64, code: &[u8]) -> Machine {
        let vm = kvm.create_vm().unwrap();
        Machine::on(kvm, vm, irqchip, vcpus, code)
    }

    pub(crate) fn on(kvm: Kvm, vm: VmFd, irqchip: Irqchip, vcpus: u64, code: &[u8]) -> Machine {
        let memory = Memory::new(MEMORY);
        // SAFETY: the memory lives in the machine, which drops the VM first.
        unsafe { vm.set_user_memory_region(memory.region(0, 0)).unwrap() };
        match irqchip {
            Irqchip::None => {}
            Irqchip::Full => vm.create_irq_chip().unwrap(),
            Irqchip::Split => enable(&vm, KVM_CAP_SPLIT_IRQCHIP, 24).unwrap(),
        }
        memory.write(CODE, code);
        let vcpus = (0..vcpus)
            .map(|id| {
                let vcpu = vm.create_vcpu(id).unwrap();
                vcpu.set_cpuid2(&kvm.get_supported_cpuid(256).unwrap())
                    .unwrap();
                vcpu
            })
            .collect();
        let machine = Machine {
            kvm,
            vm,
            vcpus,
            memory,
        };
        machine.page_tables();
        machine.long_mode(0);
        machine
    }

    fn page_tables(&self) {
        const PRESENT_WRITABLE_USER: u64 = 7;
        const PAGE_SIZE: u64 = 1 << 7;
        self.memory
            .write_u64(TABLES, (TABLES + 0x1000) | PRESENT_WRITABLE_USER);
        for gib in 0..4 {
            let directory = TABLES + 0x2000 + gib * 0x1000;
            self.memory
                .write_u64(TABLES + 0x1000 + gib * 8, directory | PRESENT_WRITABLE_USER);
            for i in 0..512 {
                let page = gib << 30 | i << 21;
                self.memory
                    .write_u64(directory + i * 8, page | PRESENT_WRITABLE_USER | PAGE_SIZE);
            }
        }
    }

    /// Puts a vCPU into 64-bit mode at [`CODE`].
    pub(crate) fn long_mode(&self, id: usize) {
        self.memory.write_u64(GDT + 8, 0x00af_9b00_0000_ffff);
        self.memory.write_u64(GDT + 16, 0x00cf_9300_0000_ffff);
        let vcpu = &self.vcpus[id];
        let mut sregs = vcpu.get_sregs().unwrap();
        let code = kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: 8,
            type_: 11,
            present: 1,
            dpl: 0,
            db: 0,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment {
            selector: 16,
            type_: 3,
            db: 1,
            l: 0,
            ..code
        };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.gdt = kvm_dtable {
            base: GDT,
            limit: 23,
            ..Default::default()
        };
        sregs.idt = kvm_dtable {
            base: IDT,
            limit: 0xfff,
            ..Default::default()
        };
        sregs.cr0 = 0x8005_0033;
        sregs.cr3 = TABLES;
        sregs.cr4 = 0x620;
        sregs.efer = 0x500;
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rsp, regs.rflags) = (CODE, STACK, 2);
        vcpu.set_regs(&regs).unwrap();
    }

    /// Puts the first vCPU into 32-bit protected mode without paging, with flat segments.
    pub(crate) fn protected_mode(&self) {
        let vcpu = &self.vcpus[0];
        let mut sregs = vcpu.get_sregs().unwrap();
        let code = kvm_segment {
            limit: 0xffff_ffff,
            selector: 8,
            type_: 11,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment {
            selector: 16,
            type_: 3,
            ..code
        };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x11, 0, 0, 0);
        vcpu.set_sregs(&sregs).unwrap();
    }

    /// Lets the first vCPU's guest use AVX.
    pub(crate) fn enable_avx(&self) {
        let vcpu = &self.vcpus[0];
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cr4 |= 1 << 18;
        vcpu.set_sregs(&sregs).unwrap();
        let mut xcrs = vcpu.get_xcrs().unwrap();
        xcrs.xcrs[0].value = 7;
        vcpu.set_xcrs(&xcrs).unwrap();
    }

    /// Points an interrupt vector at 64-bit code.
    pub(crate) fn gate(&self, vector: u8, handler: u64) {
        let at = IDT + 16 * vector as u64;
        let low = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        self.memory.write_u64(at, low);
        self.memory.write_u64(at + 8, handler >> 32);
    }

    /// Has interrupts with a vector counted at `counter`, by code at `handler`.
    pub(crate) fn count(&self, vector: u8, handler: u64, counter: u64) {
        self.gate(vector, handler);
        self.code_at(handler, |a| {
            a.inc(dword_ptr(counter))?;
            a.iretq()
        });
    }

    /// Writes code to memory.
    pub(crate) fn code_at(
        &self,
        at: u64,
        build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) {
        self.memory.write(at, &assemble_at(at, build));
    }

    pub(crate) fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpus[0]
    }
}
