//! APIC virtualization: what reaches the virtual-APIC page, what exits, and when virtual
//! interrupts are delivered.

use crate::bench::*;
use crate::guest::{Guest, Memory};
use arch::apic::{AccessType, InterruptStatus, access_qualification, reg, vector_position};
use arch::control_registers::Rflags;
use arch::controls::{Activity, PinControls, PrimaryControls, SecondaryControls};
use arch::exit::ExitReason;
use eptide_cpu::{Bus, BusResponse, Emulated, MmioHint, Vcpu};
use iced_x86::code_asm::*;

use SecondaryControls as S;

/// Guest-physical and linear address of the APIC-access page.
const APIC: u64 = 0x5_0000;
/// What the memory behind the APIC-access page holds: nobody may ever see it.
const BEHIND: u64 = 0xdead_dead_dead_dead;

struct ApicGuest {
    guest: Guest,
    page: Memory,
}

impl ApicGuest {
    /// A guest with a TPR shadow and these secondary controls.
    fn new(secondary: SecondaryControls) -> ApicGuest {
        let mut guest = long_guest();
        let page = Memory::new(4096);
        for offset in (0..0x1000).step_by(8) {
            guest.memory.write_u64(APIC + offset, BEHIND);
        }
        guest.controls.primary |= PrimaryControls::TPR_SHADOW;
        guest.controls.secondary |= secondary;
        guest.controls.pin |= PinControls::EXTERNAL_INTERRUPT_EXITING;
        guest.controls.virtual_apic = page.hva;
        guest.controls.apic_access = guest.memory.hva + APIC;
        ApicGuest { guest, page }
    }

    fn load(&mut self, write: impl FnOnce(&mut CodeAssembler)) {
        let code = assemble(64, CODE, |a| {
            write(a);
            a.hlt().unwrap();
        });
        self.guest.load(&code);
        self.guest.vcpu.state.regs[1] = APIC;
    }

    fn register(&self, offset: u32) -> u32 {
        self.page.read_u64(offset.into()) as u32
    }

    fn set(&self, offset: u32, value: u32) {
        self.page.write(offset.into(), &value.to_le_bytes());
    }

    fn request(&mut self, vector: u8) {
        let (offset, bit) = vector_position(reg::IRR, vector);
        self.set(offset, self.register(offset) | 1 << bit);
        let status = self.guest.vcpu.state.interrupt_status;
        let requesting = status.requesting().max(vector);
        self.guest.vcpu.state.interrupt_status =
            InterruptStatus::new(requesting, status.servicing());
    }

    fn vector(&self, base: u32, vector: u8) -> bool {
        let (offset, bit) = vector_position(base, vector);
        self.register(offset) >> bit & 1 != 0
    }

    fn status(&self) -> (u8, u8) {
        let status = self.guest.vcpu.state.interrupt_status;
        (status.requesting(), status.servicing())
    }
}

#[test]
fn accesses_to_the_page_exit_unless_they_are_virtualized() {
    type Access = (&'static str, fn(&mut CodeAssembler), AccessType, u32);
    let accesses: [Access; 7] = [
        (
            "read",
            |a| a.mov(eax, dword_ptr(rcx + 0x20)).unwrap(),
            AccessType::Read,
            0x20,
        ),
        (
            "write",
            |a| a.mov(dword_ptr(rcx + 0x300), eax).unwrap(),
            AccessType::Write,
            0x300,
        ),
        (
            "wide read",
            |a| a.mov(rax, qword_ptr(rcx + 0x80)).unwrap(),
            AccessType::Read,
            0x80,
        ),
        (
            "wide write",
            |a| a.mov(qword_ptr(rcx + 0x80), rax).unwrap(),
            AccessType::Write,
            0x80,
        ),
        (
            "unaligned",
            |a| a.mov(ax, word_ptr(rcx + 0x83)).unwrap(),
            AccessType::Read,
            0x83,
        ),
        (
            "vector",
            |a| a.movups(xmm0, xmmword_ptr(rcx + 0x80)).unwrap(),
            AccessType::Read,
            0x80,
        ),
        ("fetch", |a| a.jmp(rcx).unwrap(), AccessType::Fetch, 0),
    ];
    for (name, access, kind, offset) in accesses {
        let mut apic = ApicGuest::new(S::VIRTUALIZE_APIC_ACCESSES);
        let length = assemble(64, CODE, access).len();
        apic.load(access);
        let before = apic.guest.vcpu.state.regs[..16].to_vec();
        let exit = apic.guest.run_to(ExitReason::ApicAccess);
        assert_eq!(
            exit.qualification,
            access_qualification(kind, offset),
            "{name}"
        );
        assert_eq!(apic.guest.vcpu.state.regs[..16], before, "{name}");
        if kind == AccessType::Fetch {
            assert_eq!(apic.guest.vcpu.state.rip, APIC);
        } else {
            assert_eq!(apic.guest.vcpu.state.rip, CODE, "{name}");
            assert_eq!(exit.instruction_length as usize, length, "{name}");
        }
        assert_eq!(apic.guest.memory.read_u64(APIC + 0x300), BEHIND);
    }
}

#[test]
fn an_access_across_the_end_of_the_page_exits_with_neither_half_done() {
    let mut apic = ApicGuest::new(S::VIRTUALIZE_APIC_ACCESSES);
    apic.load(|a| a.mov(dword_ptr(rcx - 2), eax).unwrap());
    let exit = apic.guest.run_to(ExitReason::ApicAccess);
    assert_eq!(
        exit.qualification,
        access_qualification(AccessType::Write, 0)
    );
    assert_eq!(apic.guest.memory.bytes()[APIC as usize - 2..][..2], [0, 0]);
}

#[test]
fn an_access_by_event_delivery_and_one_to_a_paging_structure_say_so() {
    let mut apic = ApicGuest::new(S::VIRTUALIZE_APIC_ACCESSES);
    apic.load(|a| a.ud2().unwrap());
    apic.guest.vcpu.state.regs[4] = APIC + 0x100;
    let exit = apic.guest.run_to(ExitReason::ApicAccess);
    let delivery = access_qualification(AccessType::Delivery, 0x0f8);
    assert_eq!(exit.qualification, delivery);
    assert_eq!(exit.idt_vectoring_info.vector(), 6);

    // The APIC-access page in place of the page directory.
    let mut apic = ApicGuest::new(S::VIRTUALIZE_APIC_ACCESSES);
    apic.load(|a| a.nop().unwrap());
    apic.guest.memory.write_u64(0x2000, APIC | 7);
    let exit = apic.guest.run_to(ExitReason::ApicAccess);
    assert_eq!(exit.qualification >> 12, AccessType::Physical as u64);
}

#[test]
fn without_its_control_the_page_is_memory() {
    let mut apic = ApicGuest::new(S::empty());
    apic.load(|a| a.mov(rax, qword_ptr(rcx + 0x300)).unwrap());
    apic.guest.run_to_halt();
    assert_eq!(apic.guest.vcpu.state.regs[0], BEHIND);
    // What the TLB learnt is forgotten when the control is set.
    apic.guest.controls.secondary |= S::VIRTUALIZE_APIC_ACCESSES;
    apic.guest.vcpu.state.rip = CODE;
    apic.guest.run_to(ExitReason::ApicAccess);
}

#[test]
fn register_virtualization_answers_reads_and_traps_writes() {
    let mut apic = ApicGuest::new(S::VIRTUALIZE_APIC_ACCESSES | S::APIC_REGISTER_VIRTUALIZATION);
    apic.set(reg::ID, 0x0300_0000);
    apic.load(|a| {
        a.mov(eax, dword_ptr(rcx + 0x20)).unwrap();
        a.movzx(edx, byte_ptr(rcx + 0x23)).unwrap();
        a.mov(dword_ptr(rcx + 0x310), ebx).unwrap();
        a.mov(dword_ptr(rcx + 0x320), ebx).unwrap();
        a.mov(rsi, rbx).unwrap();
    });
    apic.guest.vcpu.state.regs[3] = 0x0501_2345;
    let exit = apic.guest.run_to(ExitReason::ApicWrite);
    assert_eq!(exit.qualification, u64::from(reg::LVT_TIMER));
    let state = &apic.guest.vcpu.state;
    assert_eq!((state.regs[0], state.regs[2]), (0x0300_0000, 3));
    assert_eq!(state.regs[6], 0, "the exit comes right behind the write");
    assert_eq!(apic.register(reg::LVT_TIMER), 0x0501_2345);
    assert_eq!(
        apic.register(reg::ICR2),
        0x0500_0000,
        "only the destination"
    );
    apic.guest.run_to_halt();
    assert_eq!(apic.guest.vcpu.state.regs[6], 0x0501_2345);
    assert_eq!(apic.guest.memory.read_u64(APIC + 0x320), BEHIND);
}

#[test]
fn a_write_below_the_threshold_exits_after_the_instruction() {
    let mut apic = ApicGuest::new(S::VIRTUALIZE_APIC_ACCESSES);
    apic.set(reg::TPR, 0x60);
    apic.guest.controls.tpr_threshold = 5;
    apic.load(|a| {
        a.mov(dword_ptr(rcx + 0x80), 0x1234_5670).unwrap();
        a.or(dword_ptr(rcx + 0x80), 0x01).unwrap();
        a.mov(byte_ptr(rcx + 0x80), 0x40).unwrap();
        a.mov(eax, 1).unwrap();
    });
    let exit = apic.guest.run_to(ExitReason::TprBelowThreshold);
    assert_eq!(exit.instruction_length, 0);
    assert_eq!(apic.register(reg::TPR), 0x40);
    assert_eq!(apic.guest.vcpu.state.regs[0], 0);
    let behind = assemble(64, CODE, |a| {
        a.mov(dword_ptr(rcx + 0x80), 0x1234_5670).unwrap();
        a.or(dword_ptr(rcx + 0x80), 0x01).unwrap();
        a.mov(byte_ptr(rcx + 0x80), 0x40).unwrap();
    });
    assert_eq!(apic.guest.vcpu.state.rip, CODE + behind.len() as u64);
    // Entered again it exits at once.
    apic.guest.run_to(ExitReason::TprBelowThreshold);
    assert_eq!(apic.guest.vcpu.state.regs[0], 0);
    apic.guest.controls.tpr_threshold = 4;
    apic.guest.run_to_halt();
}

#[test]
fn the_upper_bytes_of_the_task_priority_are_dropped() {
    let mut apic = ApicGuest::new(S::VIRTUALIZE_APIC_ACCESSES);
    apic.load(|a| a.mov(dword_ptr(rcx + 0x80), 0x1234_5670).unwrap());
    apic.guest.run_to_halt();
    assert_eq!(apic.register(reg::TPR), 0x70);
}

#[test]
fn cr8_is_the_task_priority_of_the_page() {
    let mut apic = ApicGuest::new(S::empty());
    apic.set(reg::TPR, 0x9f);
    apic.load(|a| {
        a.mov(rax, cr8).unwrap();
        a.mov(cr8, rdx).unwrap();
    });
    apic.guest.vcpu.state.regs[2] = 3;
    apic.guest.run_to_halt();
    assert_eq!(apic.guest.vcpu.state.regs[0], 9);
    assert_eq!(apic.register(reg::TPR), 0x30);
    assert_eq!(
        apic.guest.vcpu.state.cr8, 0,
        "the register itself is untouched"
    );
}

/// With everything but x2APIC mode.
fn delivering() -> ApicGuest {
    let mut apic = ApicGuest::new(
        S::VIRTUALIZE_APIC_ACCESSES
            | S::APIC_REGISTER_VIRTUALIZATION
            | S::VIRTUAL_INTERRUPT_DELIVERY,
    );
    apic.guest
        .vcpu
        .state
        .set_rflags((Rflags::IF | Rflags::FIXED).bits());
    apic
}

#[test]
fn an_interrupt_that_waits_is_delivered_at_entry() {
    let mut apic = delivering();
    apic.load(|a| a.nop().unwrap());
    apic.request(0x31);
    apic.request(0x85);
    assert_eq!(apic.guest.run_to_handler(), 0x85);
    assert_eq!(apic.status(), (0x31, 0x85));
    assert!(apic.vector(reg::ISR, 0x85) && !apic.vector(reg::IRR, 0x85));
    assert!(apic.vector(reg::IRR, 0x31));
    assert_eq!(apic.register(reg::PPR), 0x80);
    assert_eq!(apic.guest.stack(0), CODE, "before the first instruction");
}

#[test]
fn an_interrupt_waits_for_if_for_its_shadow_and_for_the_priority() {
    // IF, and the instruction behind STI.
    let mut apic = delivering();
    apic.guest.vcpu.state.set_rflags(2);
    apic.load(|a| {
        a.nop().unwrap();
        a.sti().unwrap();
        a.inc(eax).unwrap();
        a.inc(eax).unwrap();
    });
    apic.request(0x41);
    assert_eq!(apic.guest.run_to_handler(), 0x41);
    assert_eq!(apic.guest.vcpu.state.regs[0], 1);
    assert_eq!(apic.guest.stack(0), CODE + 4);

    // The task priority, lowered by CR8.
    let mut apic = delivering();
    apic.set(reg::TPR, 0x50);
    apic.load(|a| {
        a.inc(eax).unwrap();
        a.mov(cr8, rdx).unwrap();
        a.inc(eax).unwrap();
    });
    apic.guest.vcpu.state.regs[2] = 0;
    apic.request(0x51);
    assert_eq!(apic.guest.run_to_handler(), 0x51);
    assert_eq!(apic.guest.vcpu.state.regs[0], 1);

    // An interrupt window comes before it: then none is recognized.
    let mut apic = delivering();
    apic.guest.controls.primary |= PrimaryControls::INTERRUPT_WINDOW_EXITING;
    apic.load(|a| a.nop().unwrap());
    apic.request(0x51);
    apic.guest.run_to(ExitReason::InterruptWindow);
    assert_eq!(apic.status(), (0x51, 0));
}

#[test]
fn end_of_interrupt_lets_the_next_one_in_or_exits() {
    // The handler of 85H ends the interrupt; 31H follows before the next instruction.
    let mut apic = delivering();
    apic.load(|a| a.nop().unwrap());
    apic.request(0x31);
    apic.request(0x85);
    let handler = HANDLERS + 16 * 0x85;
    let code = assemble(64, handler, |a| {
        a.mov(dword_ptr(rcx + 0xb0), eax).unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    apic.guest.memory.write(handler, &code);
    apic.set(reg::EOI, 7);
    assert_eq!(apic.guest.run_to_handler(), 0x31);
    assert_eq!(apic.status(), (0, 0x31));
    assert_eq!(apic.register(reg::EOI), 0);
    assert!(!apic.vector(reg::ISR, 0x85) && apic.vector(reg::ISR, 0x31));

    // The same with 85H in the EOI-exit bitmap.
    let mut apic = delivering();
    apic.load(|a| a.nop().unwrap());
    apic.guest.controls.eoi_exit_bitmap[2] = 1 << (0x85 - 0x80);
    apic.request(0x31);
    apic.request(0x85);
    apic.guest.memory.write(handler, &code);
    let exit = apic.guest.run_to(ExitReason::VirtualizedEoi);
    assert_eq!(exit.qualification, 0x85);
    assert_eq!(apic.status(), (0x31, 0));
    let write = assemble(64, handler, |a| a.mov(dword_ptr(rcx + 0xb0), eax).unwrap());
    assert_eq!(apic.guest.vcpu.state.rip, handler + write.len() as u64);
    assert_eq!(apic.guest.run_to_handler(), 0x31);
}

#[test]
fn an_interrupt_to_oneself_is_delivered_and_others_are_reported() {
    let mut apic = delivering();
    apic.load(|a| a.mov(dword_ptr(rcx + 0x300), 0x4_0061).unwrap());
    assert_eq!(apic.guest.run_to_handler(), 0x61);

    let mut apic = delivering();
    apic.load(|a| a.mov(dword_ptr(rcx + 0x300), 0xc_0061).unwrap());
    let exit = apic.guest.run_to(ExitReason::ApicWrite);
    assert_eq!(exit.qualification, u64::from(reg::ICR));
    assert_eq!(apic.register(reg::ICR), 0xc_0061);
}

#[test]
fn a_virtual_interrupt_ends_a_halt() {
    let mut apic = delivering();
    apic.guest.controls.primary -= PrimaryControls::HLT_EXITING;
    apic.load(|a| a.nop().unwrap());
    apic.guest.vcpu.state.activity = Activity::Halt;
    apic.request(0x91);
    // The handler's own HLT must be seen.
    let handler = HANDLERS + 16 * 0x91;
    apic.guest
        .memory
        .write(handler, &assemble(64, handler, |a| a.vmcall().unwrap()));
    apic.guest.run_to(ExitReason::Vmcall);
    assert_eq!(apic.guest.vcpu.state.rip, handler);
    assert_eq!(apic.guest.vcpu.state.activity, Activity::Active);
}

#[test]
fn x2apic_registers_are_those_of_the_page() {
    let mut apic = ApicGuest::new(
        S::VIRTUALIZE_X2APIC | S::APIC_REGISTER_VIRTUALIZATION | S::VIRTUAL_INTERRUPT_DELIVERY,
    );
    for msr in 0x800..0x900 {
        for write in [false, true] {
            apic.guest.controls.msr_bitmap.set(msr, write, false);
        }
    }
    apic.set(reg::VERSION, 0x15);
    apic.load(|a| {
        a.mov(ecx, 0x803).unwrap();
        a.rdmsr().unwrap();
        a.mov(esi, eax).unwrap();
        a.mov(ecx, 0x808).unwrap();
        a.mov(eax, 0x20).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.mov(ecx, 0x83f).unwrap();
        a.mov(eax, 0x35).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, 0x05).unwrap();
        a.wrmsr().unwrap();
    });
    let exit = apic.guest.run_to(ExitReason::ApicWrite);
    assert_eq!(exit.qualification, u64::from(reg::SELF_IPI));
    assert_eq!(apic.guest.vcpu.state.regs[6], 0x15);
    assert_eq!(apic.register(reg::TPR), 0x20);
    assert_eq!(apic.status(), (0x35, 0), "requested while IF is clear");
    apic.guest
        .vcpu
        .state
        .set_rflags((Rflags::IF | Rflags::FIXED).bits());
    assert_eq!(apic.guest.run_to_handler(), 0x35);

    // EOI by MSR, then reserved bits.
    apic.load(|a| {
        a.mov(ecx, 0x80b).unwrap();
        a.xor(eax, eax).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.inc(eax).unwrap();
        a.wrmsr().unwrap();
    });
    assert_eq!(apic.guest.run_to_handler(), 13);
    assert_eq!(apic.status(), (0, 0));

    // What is not virtualized is not there, unless the bitmap makes it exit.
    apic.load(|a| {
        a.mov(ecx, 0x828).unwrap();
        a.wrmsr().unwrap();
    });
    assert_eq!(apic.guest.run_to_handler(), 13);
    apic.guest.controls.msr_bitmap.set(0x828, true, true);
    apic.guest.vcpu.state.rip = CODE;
    apic.guest.run_to(ExitReason::Wrmsr);
}

#[test]
fn posted_interrupts_arrive_without_an_exit() {
    let mut apic = delivering();
    let descriptor = Memory::new(4096);
    apic.guest.controls.posted_interrupts = descriptor.hva;
    apic.guest.controls.pin |= PinControls::POSTED_INTERRUPTS;
    apic.load(|a| a.jmp(CODE).unwrap());
    descriptor.write_u64(8, 1 << (0x73 - 0x40));
    descriptor.write_u64(32, 1);
    let attention = apic.guest.vcpu.attention();
    let poster = std::thread::spawn(move || {
        while !attention.in_guest() {
            std::thread::yield_now();
        }
        attention.notify();
    });
    assert_eq!(apic.guest.run_to_handler(), 0x73);
    poster.join().unwrap();
    assert_eq!([descriptor.read_u64(8), descriptor.read_u64(32)], [0, 0]);

    // Without the control a notification is an interrupt like any other.
    apic.guest.controls.pin -= PinControls::POSTED_INTERRUPTS;
    apic.guest.vcpu.attention().notify();
    apic.guest.run_to(ExitReason::ExternalInterrupt);
}

#[test]
fn emulation_sends_accesses_to_the_bus() {
    struct Register(Vec<(u64, u32)>);
    impl Bus for Register {
        fn read(&mut self, gpa: u64, data: &mut [u8]) -> BusResponse {
            data.fill(0x5a);
            self.0.push((gpa, 0));
            BusResponse::Done
        }
        fn write(&mut self, gpa: u64, data: &[u8]) -> BusResponse {
            self.0
                .push((gpa, u32::from_le_bytes(data.try_into().unwrap())));
            BusResponse::Done
        }
    }
    for hint in [
        None,
        Some(MmioHint {
            gva: APIC,
            gpa: APIC,
        }),
    ] {
        let mut apic = ApicGuest::new(S::VIRTUALIZE_APIC_ACCESSES);
        apic.load(|a| a.add(dword_ptr(rcx + 0x380), 1).unwrap());
        apic.guest.run_to(ExitReason::ApicAccess);
        let mut bus = Register(Vec::new());
        let guest = &mut apic.guest;
        let done = guest.vcpu.emulate(&guest.controls, hint, &mut bus);
        assert_eq!(done, Emulated::Done);
        assert_eq!(bus.0, [(APIC + 0x380, 0), (APIC + 0x380, 0x5a5a_5a5b)]);
        guest.run_to_halt();
    }
}

#[test]
fn a_repeated_store_is_virtualized_one_by_one() {
    let mut apic = ApicGuest::new(S::VIRTUALIZE_APIC_ACCESSES | S::APIC_REGISTER_VIRTUALIZATION);
    apic.load(|a| {
        a.lea(rdi, qword_ptr(rcx + 0x320)).unwrap();
        a.mov(ecx, 2).unwrap();
        a.rep().stosd().unwrap();
    });
    let exit = apic.guest.run_to(ExitReason::ApicWrite);
    assert_eq!(exit.qualification, u64::from(reg::LVT_TIMER));
    assert_eq!(apic.guest.vcpu.state.regs[1], 1, "one element");
    let exit = apic.guest.run_to(ExitReason::ApicAccess);
    assert_eq!(
        exit.qualification,
        access_qualification(AccessType::Write, 0x324)
    );
}

#[test]
fn a_push_is_wider_than_a_register() {
    let mut apic = ApicGuest::new(S::VIRTUALIZE_APIC_ACCESSES | S::APIC_REGISTER_VIRTUALIZATION);
    apic.load(|a| {
        a.mov(rsp, rcx).unwrap();
        a.add(rsp, 0x88).unwrap();
        a.pushfq().unwrap();
    });
    let exit = apic.guest.run_to(ExitReason::ApicAccess);
    assert_eq!(
        exit.qualification,
        access_qualification(AccessType::Write, 0x80)
    );
}

#[test]
fn controls_that_contradict_each_other_fail_the_entry_by_name() {
    type Break = fn(&mut Guest);
    let cases: [(Break, &str); 13] = [
        (
            |g| g.controls.virtual_apic += 8,
            "the virtual-APIC address is page-aligned",
        ),
        (
            |g| g.controls.tpr_threshold = 0x10,
            "TPR threshold bits 31:4 are zero without virtual-interrupt delivery",
        ),
        (
            |g| g.controls.tpr_threshold = 1,
            "the TPR threshold is not above the virtual task priority, unless APIC accesses are \
             virtualized",
        ),
        (
            |g| {
                g.controls.secondary |= S::VIRTUALIZE_APIC_ACCESSES;
                g.controls.apic_access += 8;
            },
            "the APIC-access address is page-aligned",
        ),
        (
            |g| {
                g.controls.primary -= PrimaryControls::TPR_SHADOW;
                g.controls.secondary |= S::APIC_REGISTER_VIRTUALIZATION;
            },
            "x2APIC mode, APIC-register virtualization and virtual-interrupt delivery require the \
             TPR shadow",
        ),
        (
            |g| g.controls.secondary |= S::VIRTUALIZE_X2APIC | S::VIRTUALIZE_APIC_ACCESSES,
            "x2APIC mode and APIC accesses are not both virtualized",
        ),
        (
            |g| {
                g.controls.secondary |= S::VIRTUAL_INTERRUPT_DELIVERY;
                g.controls.pin -= PinControls::EXTERNAL_INTERRUPT_EXITING;
            },
            "virtual-interrupt delivery requires external-interrupt exiting",
        ),
        (
            |g| g.controls.pin |= PinControls::POSTED_INTERRUPTS,
            "posted interrupts require virtual-interrupt delivery",
        ),
        (
            |g| {
                g.controls.pin |= PinControls::POSTED_INTERRUPTS;
                g.controls.secondary |= S::VIRTUAL_INTERRUPT_DELIVERY;
                g.controls.posted_interrupts = 8;
            },
            "the posted-interrupt descriptor is 64-byte-aligned",
        ),
        (|g| g.controls.eptp.0 |= 7, "the EPT pointer is valid"),
        (|g| g.controls.eptp.0 |= 0x38, "the EPT pointer is valid"),
        (
            |g| {
                g.controls.secondary -= S::ENABLE_EPT;
                g.controls.secondary |= S::ENABLE_PML;
            },
            "page-modification logging requires EPT",
        ),
        (
            |g| {
                g.controls.secondary -= S::ENABLE_EPT;
                g.controls.secondary |= S::MODE_BASED_EXECUTE;
            },
            "mode-based execute control requires EPT",
        ),
    ];
    for (spoil, rule) in cases {
        let mut apic = ApicGuest::new(S::empty());
        apic.load(|_| {});
        spoil(&mut apic.guest);
        let exit = apic.guest.run_to(ExitReason::InvalidGuestState);
        assert!(exit.entry_failure);
        assert_eq!(Vcpu::failed_entry_check(&exit), Some(rule));
    }
}
