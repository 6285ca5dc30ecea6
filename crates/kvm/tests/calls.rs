//! What calls answer in each state: the KVM API documentation's errors, and states read back.

mod common;

use common::*;
use eptide_kvm as kvm;
use kvm::ioctl::{Answer, Kind, Object, TABLE, ioctl};
use kvm::{Kvm, VcpuExit, VcpuFd, VmFd};
use kvm_bindings::*;
use std::io::Read;
use vmm_sys_util::eventfd::EventFd;

/// An ioctl by name with an argument in memory; its value, or the errno.
fn call<T>(object: Object<'_>, name: &str, argument: &mut T) -> Result<i64, i32> {
    number(object, name, std::ptr::from_mut(argument) as u64)
}

/// An ioctl by name with a number.
fn number(object: Object<'_>, name: &str, argument: u64) -> Result<i64, i32> {
    let kind = match object {
        Object::System(_) => Kind::System,
        Object::Vm(_) => Kind::Vm,
        Object::Vcpu(_) => Kind::Vcpu,
    };
    let row = TABLE
        .iter()
        .find(|row| row.kind == kind && row.name == name)
        .unwrap();
    match ioctl(object, row.request(), argument) {
        Ok(Answer::Value(value)) => Ok(value),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.errno()),
    }
}

fn errno<T: std::fmt::Debug>(result: Result<T, kvm::Error>) -> i32 {
    result.unwrap_err().errno()
}

fn vm() -> (Kvm, VmFd) {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    (kvm, vm)
}

fn with_vcpu(full: bool) -> (Kvm, VmFd, VcpuFd) {
    let (kvm, vm) = vm();
    if full {
        vm.create_irq_chip().unwrap();
    }
    let vcpu = vm.create_vcpu(0).unwrap();
    (kvm, vm, vcpu)
}

#[test]
fn controllers_come_before_processors_and_once() {
    let (_kvm, vm) = vm();
    assert_eq!(
        errno(vm.create_pit2(kvm_pit_config::default())),
        libc::ENOENT
    );
    assert_eq!(
        errno(vm.get_irqchip(&mut kvm_irqchip::default())),
        libc::ENXIO
    );
    assert_eq!(errno(vm.set_irq_line(0, true)), libc::ENXIO);
    assert_eq!(errno(vm.signal_msi(kvm_msi::default())), libc::EINVAL);
    let line = EventFd::new(0).unwrap();
    assert_eq!(errno(vm.register_irqfd(&line, 1)), libc::EINVAL);
    let empty = KvmIrqRouting::new(0).unwrap();
    assert_eq!(errno(vm.set_gsi_routing(&empty)), libc::EINVAL);
    let vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(errno(vcpu.get_lapic()), libc::EINVAL);
    assert_eq!(errno(vm.create_irq_chip()), libc::EINVAL);
    assert_eq!(enable(&vm, KVM_CAP_SPLIT_IRQCHIP, 24), Err(libc::EINVAL));
    assert_eq!(errno(vm.create_vcpu(0)), libc::EEXIST);
    assert_eq!(errno(vm.create_vcpu(1 << 20)), libc::EINVAL);
    assert_eq!(errno(vm.set_boot_cpu_id(1)), libc::EBUSY);
    assert_eq!(errno(vm.set_identity_map_address(0x1000)), libc::EINVAL);

    let (_kvm, vm, _vcpu) = with_vcpu(true);
    assert_eq!(errno(vm.create_irq_chip()), libc::EEXIST);
    vm.create_pit2(kvm_pit_config::default()).unwrap();
    assert_eq!(
        errno(vm.create_pit2(kvm_pit_config::default())),
        libc::EEXIST
    );
    let mut chip = kvm_irqchip {
        chip_id: 3,
        ..Default::default()
    };
    assert_eq!(errno(vm.get_irqchip(&mut chip)), libc::EINVAL);
    assert_eq!(errno(vm.set_irqchip(&chip)), libc::EINVAL);
}

#[test]
fn the_task_state_segment_fits_below_4_gib() {
    let (_kvm, vm) = vm();
    vm.set_tss_address(0xffff_d000).unwrap();
    assert_eq!(errno(vm.set_tss_address(0xffff_d001)), libc::EINVAL);
}

#[test]
fn lines_that_lead_nowhere_are_ignored() {
    let (_kvm, vm, _vcpu) = with_vcpu(true);
    assert_eq!(vm.set_irq_line_status(23, true).unwrap(), -1, "masked");
    assert_eq!(vm.set_irq_line_status(5000, true).unwrap(), -1, "no route");
    vm.set_irq_line(u32::MAX, true).unwrap();
}

#[test]
fn messages_that_nobody_takes_say_so() {
    let (_kvm, vm, vcpu) = with_vcpu(true);
    let message = kvm_msi {
        address_lo: 0xfee0_0000,
        data: 0x41,
        ..Default::default()
    };
    assert_eq!(vm.signal_msi(message).unwrap(), 0, "the APIC is disabled");
    let mut lapic = vcpu.get_lapic().unwrap();
    lapic.regs[0xf1] |= 1;
    vcpu.set_lapic(&lapic).unwrap();
    assert_eq!(vm.signal_msi(message).unwrap(), 1);
    assert_eq!(vm.signal_msi(message).unwrap(), 0, "merged");
    let nobody = kvm_msi {
        address_lo: 0xfee0_9000,
        ..message
    };
    assert_eq!(errno(vm.signal_msi(nobody)), libc::EPERM);
    let flags = kvm_msi {
        flags: 2,
        ..message
    };
    assert_eq!(errno(vm.signal_msi(flags)), libc::EINVAL);
}

/// With 32-bit IDs and the quirk, which is the default, 255 is everyone still.
#[test]
fn the_broadcast_of_messages_is_as_the_quirk_says() {
    let x2apic = |flags: u32| {
        let (kvm, vm) = vm();
        if flags != 0 {
            enable(&vm, KVM_CAP_X2APIC_API, flags as u64).unwrap();
        }
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(256).unwrap())
            .unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.apic_base |= 1 << 10;
        vcpu.set_sregs(&sregs).unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        lapic.regs[0xf1] |= 1;
        vcpu.set_lapic(&lapic).unwrap();
        let message = |address_hi| kvm_msi {
            address_lo: 0xfeef_f000,
            address_hi,
            data: 0x41,
            ..Default::default()
        };
        let narrow = vm.signal_msi(message(0)).is_ok();
        let wide = vm.signal_msi(message(0xffff_ff00)).is_ok();
        (narrow, wide)
    };
    let ids = KVM_X2APIC_API_USE_32BIT_IDS;
    let no_quirk = KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    assert!(x2apic(0).0);
    assert_eq!(x2apic(ids), (true, true));
    assert_eq!(x2apic(ids | no_quirk), (false, true));
    assert!(!x2apic(no_quirk).0);
}

#[test]
fn routes_are_checked() {
    let (_kvm, vm, _vcpu) = with_vcpu(true);
    let entry = |gsi, flags| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            flags,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi.address_lo = 0xfee0_0000;
        KvmIrqRouting::from_entries(&[entry]).unwrap()
    };
    vm.set_gsi_routing(&entry(4095, 0)).unwrap();
    assert_eq!(errno(vm.set_gsi_routing(&entry(4096, 0))), libc::EINVAL);
    assert_eq!(errno(vm.set_gsi_routing(&entry(1, 2))), libc::EINVAL);
    let mut raw = [5000u32, 0];
    assert_eq!(
        call(Object::Vm(&vm), "KVM_SET_GSI_ROUTING", &mut raw),
        Err(libc::EINVAL)
    );
    let mut raw = [0u32, 1];
    assert_eq!(
        call(Object::Vm(&vm), "KVM_SET_GSI_ROUTING", &mut raw),
        Err(libc::EINVAL)
    );
}

#[test]
fn a_line_falls_with_its_irqfd() {
    let (_kvm, vm, _vcpu) = with_vcpu(true);
    let (line, resample) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
    vm.register_irqfd_with_resample(&line, &resample, 5)
        .unwrap();
    let level = || {
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip).unwrap();
        // SAFETY: the ID names the member.
        unsafe { chip.chip.ioapic.irr >> 5 & 1 }
    };
    line.write(1).unwrap();
    let start = std::time::Instant::now();
    while level() == 0 {
        assert!(start.elapsed().as_secs() < 5);
        std::thread::yield_now();
    }
    vm.unregister_irqfd(&line, 5).unwrap();
    assert_eq!(level(), 0);
    vm.unregister_irqfd(&line, 5).unwrap();
    let mut nothing = kvm_irqfd {
        fd: u32::MAX,
        flags: KVM_IRQFD_FLAG_DEASSIGN,
        ..Default::default()
    };
    assert_eq!(
        call(Object::Vm(&vm), "KVM_IRQFD", &mut nothing),
        Err(libc::EBADF)
    );
}

#[test]
fn what_the_clock_reads_can_be_written() {
    let (_kvm, vm) = vm();
    let clock = vm.get_clock().unwrap();
    assert_ne!(clock.flags & KVM_CLOCK_TSC_STABLE, 0);
    vm.set_clock(&clock).unwrap();
    // Time went on while the VM was away.
    let away = kvm_clock_data {
        clock: 1000,
        flags: KVM_CLOCK_REALTIME,
        realtime: clock.realtime - 5_000_000_000,
        ..Default::default()
    };
    vm.set_clock(&away).unwrap();
    let now = vm.get_clock().unwrap().clock;
    assert!((5_000_000_000..15_000_000_000).contains(&now), "{now}");
    let unknown = kvm_clock_data {
        flags: 1 << 8,
        ..clock
    };
    assert_eq!(errno(vm.set_clock(&unknown)), libc::EINVAL);
}

#[test]
fn frequencies() {
    let (_kvm, vm) = vm();
    let host = vm.get_tsc_khz().unwrap();
    vm.set_tsc_khz(0).unwrap();
    assert_eq!(vm.get_tsc_khz().unwrap(), host, "0 is the host's");
    vm.set_tsc_khz(1_000_000).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(vcpu.get_tsc_khz().unwrap(), 1_000_000);
    vcpu.set_tsc_khz(0).unwrap();
    assert_eq!(vcpu.get_tsc_khz().unwrap(), host);
    assert_eq!(errno(vcpu.kvmclock_ctrl()), libc::EINVAL, "no clock page");
}

#[test]
fn what_waits_is_shown() {
    let (_kvm, _vm, vcpu) = with_vcpu(true);
    vcpu.nmi().unwrap();
    vcpu.smi().unwrap();
    let events = vcpu.get_vcpu_events().unwrap();
    assert_eq!((events.nmi.pending, events.smi.pending), (1, 1));
    vcpu.nmi().unwrap();
    vcpu.nmi().unwrap();
    assert_eq!(vcpu.get_vcpu_events().unwrap().nmi.pending, 2, "at most");
}

/// What is read and written again is there once.
#[test]
fn an_interrupt_that_waits_is_not_doubled() {
    let code = assemble(|a| {
        stop(a)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.cli()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.count(0x60, 0x2000, 0x5000);
    runs_to_stop(&mut machine);
    machine.vcpu().interrupt(0x60).unwrap();
    assert_eq!(errno(machine.vcpu().interrupt(0x61)), libc::EEXIST);
    assert_eq!(errno(machine.vcpu().interrupt(256)), libc::EINVAL);
    let events = machine.vcpu().get_vcpu_events().unwrap();
    assert_eq!(events.interrupt.injected, 1);
    let mut none = events;
    none.interrupt.injected = 0;
    machine.vcpu().set_vcpu_events(&none).unwrap();
    let read = machine.vcpu().get_vcpu_events().unwrap();
    assert_eq!(read.interrupt.injected, 0, "taken back");
    assert_eq!(machine.vcpu().get_sregs().unwrap().interrupt_bitmap, [0; 4]);
    machine.vcpu().interrupt(0x60).unwrap();
    let sregs = machine.vcpu().get_sregs().unwrap();
    machine.vcpu().set_sregs(&sregs).unwrap();
    let mut regs = machine.vcpu().get_regs().unwrap();
    regs.rflags |= 1 << 9;
    machine.vcpu().set_regs(&regs).unwrap();
    machine.vcpu().set_vcpu_events(&events).unwrap();
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 1);
}

#[test]
fn states_of_processors_need_controllers() {
    let (_kvm, _vm, vcpu) = with_vcpu(false);
    for mp_state in [
        KVM_MP_STATE_UNINITIALIZED,
        KVM_MP_STATE_INIT_RECEIVED,
        KVM_MP_STATE_HALTED,
        KVM_MP_STATE_SIPI_RECEIVED,
        77,
    ] {
        let refused = vcpu.set_mp_state(kvm_mp_state { mp_state });
        assert_eq!(errno(refused), libc::EINVAL, "{mp_state}");
        assert_eq!(vcpu.get_mp_state().unwrap().mp_state, KVM_MP_STATE_RUNNABLE);
    }
    let (_kvm, _vm, vcpu) = with_vcpu(true);
    for mp_state in [KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED] {
        vcpu.set_mp_state(kvm_mp_state { mp_state }).unwrap();
        assert_eq!(vcpu.get_mp_state().unwrap().mp_state, mp_state);
    }
}

#[test]
fn registers_are_set_up_to_the_first_that_cannot_be() {
    let (_kvm, _vm, vcpu) = with_vcpu(true);
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let list = [
        entry(0x174, 1),
        entry(0x175, 2),
        entry(0x5555, 3),
        entry(0x176, 4),
    ];
    let list = Msrs::from_entries(&list).unwrap();
    assert_eq!(vcpu.set_msrs(&list).unwrap(), 2);
    let mut list =
        Msrs::from_entries(&[entry(0x174, 0), entry(0x175, 0), entry(0x176, 0)]).unwrap();
    assert_eq!(vcpu.get_msrs(&mut list).unwrap(), 3);
    let data: Vec<u64> = list.as_slice().iter().map(|entry| entry.data).collect();
    assert_eq!(data, [1, 2, 0]);
    let mut many = [256u32, 0];
    let object = Object::Vcpu(&vcpu);
    assert_eq!(call(object, "KVM_GET_MSRS", &mut many), Err(libc::E2BIG));
    assert_eq!(call(object, "KVM_SET_MSRS", &mut many), Err(libc::E2BIG));
}

#[test]
fn lists_grow_to_what_is_needed() {
    let (kvm, _vm, vcpu) = with_vcpu(true);
    let system = Object::System(&kvm);
    let mut one = [1u32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(
        call(system, "KVM_GET_SUPPORTED_CPUID", &mut one),
        Err(libc::E2BIG)
    );
    assert_eq!(one[0], 1, "left alone");
    let mut indices = [1u32, 7];
    assert_eq!(
        call(system, "KVM_GET_MSR_INDEX_LIST", &mut indices),
        Err(libc::E2BIG)
    );
    assert!(indices[0] > 1 && indices[1] == 7);
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(256).unwrap())
        .unwrap();
    assert_eq!(
        call(Object::Vcpu(&vcpu), "KVM_GET_CPUID2", &mut one),
        Err(libc::E2BIG)
    );
    let mut many = [257u32, 0];
    assert_eq!(
        call(Object::Vcpu(&vcpu), "KVM_SET_CPUID2", &mut many),
        Err(libc::E2BIG)
    );
}

#[test]
fn cpuid_stays_once_the_guest_has_run() {
    let mut machine = Machine::new(Irqchip::None, 1, &assemble(stop));
    runs_to_stop(&mut machine);
    let mut cpuid = machine.vcpu().get_cpuid2(256).unwrap();
    machine.vcpu().set_cpuid2(&cpuid).unwrap();
    cpuid.as_mut_slice()[1].ebx ^= 1 << 24;
    assert_eq!(errno(machine.vcpu().set_cpuid2(&cpuid)), libc::EINVAL);
}

#[test]
fn slots_are_refused_as_the_documentation_says() {
    let (_kvm, vm) = vm();
    let memory = Memory::new(1 << 20);
    let region = memory.region(0, 0);
    // SAFETY: the memory outlives the VM's use of it: no guest runs.
    let set = |region| unsafe { vm.set_user_memory_region(region) };
    let delete = |slot| kvm_userspace_memory_region {
        memory_size: 0,
        slot,
        ..region
    };
    assert_eq!(errno(set(delete(0))), libc::EINVAL, "is not there");
    set(region).unwrap();
    set(region).unwrap();
    for (what, bad) in [
        (
            "slot",
            kvm_userspace_memory_region {
                slot: 32764,
                ..region
            },
        ),
        (
            "space",
            kvm_userspace_memory_region {
                slot: 2 << 16,
                ..region
            },
        ),
        (
            "flag",
            kvm_userspace_memory_region {
                slot: 1,
                flags: 8,
                guest_phys_addr: 1 << 30,
                ..region
            },
        ),
        (
            "size",
            kvm_userspace_memory_region {
                memory_size: 0x2000,
                ..region
            },
        ),
        (
            "odd size",
            kvm_userspace_memory_region {
                slot: 1,
                memory_size: 0x1800,
                guest_phys_addr: 1 << 30,
                ..region
            },
        ),
        (
            "odd address",
            kvm_userspace_memory_region {
                slot: 1,
                guest_phys_addr: 0x4000_0800,
                ..region
            },
        ),
        (
            "odd memory",
            kvm_userspace_memory_region {
                slot: 1,
                guest_phys_addr: 1 << 30,
                userspace_addr: region.userspace_addr + 8,
                ..region
            },
        ),
        (
            "memory",
            kvm_userspace_memory_region {
                userspace_addr: region.userspace_addr + 0x1000,
                ..region
            },
        ),
        (
            "kernel's",
            kvm_userspace_memory_region {
                slot: 1,
                guest_phys_addr: 1 << 30,
                userspace_addr: 1 << 63,
                ..region
            },
        ),
        (
            "wraps",
            kvm_userspace_memory_region {
                slot: 1,
                guest_phys_addr: 0xffff_ffff_fff0_0000,
                memory_size: 0x20_0000,
                ..region
            },
        ),
        (
            "read-only",
            kvm_userspace_memory_region {
                flags: KVM_MEM_READONLY,
                ..region
            },
        ),
        (
            "too large",
            kvm_userspace_memory_region {
                slot: 1,
                guest_phys_addr: 1 << 30,
                memory_size: 1 << 43,
                ..region
            },
        ),
    ] {
        assert_eq!(errno(set(bad)), libc::EINVAL, "{what}");
    }
    let overlaps = kvm_userspace_memory_region {
        slot: 1,
        guest_phys_addr: 0xf_f000,
        ..region
    };
    assert_eq!(errno(set(overlaps)), libc::EEXIST);
    set(kvm_userspace_memory_region {
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        ..region
    })
    .unwrap();
    set(kvm_userspace_memory_region {
        guest_phys_addr: 1 << 30,
        ..region
    })
    .unwrap();
    set(overlaps).unwrap();
    set(delete(0)).unwrap();
    assert_eq!(errno(set(delete(0))), libc::EINVAL);
    // The second structure's further fields matter only with their flag.
    let mut second = kvm_userspace_memory_region2 {
        slot: 3,
        guest_phys_addr: 1 << 32,
        memory_size: region.memory_size,
        userspace_addr: region.userspace_addr,
        guest_memfd_offset: 5,
        ..Default::default()
    };
    let object = Object::Vm(&vm);
    assert_eq!(
        call(object, "KVM_SET_USER_MEMORY_REGION2", &mut second),
        Ok(0)
    );
    second.flags = KVM_MEM_GUEST_MEMFD;
    assert_eq!(
        call(object, "KVM_SET_USER_MEMORY_REGION2", &mut second),
        Err(libc::EINVAL)
    );
}

#[test]
fn dirty_logs_are_refused_as_the_documentation_says() {
    let (_kvm, vm) = vm();
    let memory = Memory::new(100 * 4096);
    let mut region = memory.region(0, 0);
    // SAFETY: no guest runs.
    unsafe { vm.set_user_memory_region(region).unwrap() };
    assert_eq!(errno(vm.get_dirty_log(0, memory.size)), libc::ENOENT);
    assert_eq!(errno(vm.get_dirty_log(9, memory.size)), libc::ENOENT);
    assert_eq!(errno(vm.get_dirty_log(40000, 4096)), libc::EINVAL);
    region.flags = KVM_MEM_LOG_DIRTY_PAGES;
    // SAFETY: as above.
    unsafe { vm.set_user_memory_region(region).unwrap() };
    let mut bitmap = [0u64; 2];
    let mut clear = |first_page, num_pages| {
        let mut log = kvm_clear_dirty_log {
            slot: 0,
            num_pages,
            first_page,
            ..Default::default()
        };
        log.__bindgen_anon_1.padding2 = bitmap.as_mut_ptr() as u64;
        call(Object::Vm(&vm), "KVM_CLEAR_DIRTY_LOG", &mut log)
    };
    assert_eq!(clear(0, 64), Ok(0));
    assert_eq!(clear(64, 36), Ok(0), "the rest may be no multiple of 64");
    assert_eq!(clear(0, 100), Ok(0));
    assert_eq!(clear(0, 36), Err(libc::EINVAL));
    assert_eq!(clear(1, 64), Err(libc::EINVAL));
    assert_eq!(clear(64, 64), Err(libc::EINVAL));
    assert_eq!(clear(128, 0), Err(libc::EINVAL));
    assert_eq!(clear(u64::MAX - 63, 64), Err(libc::EINVAL));

    let (_kvm, ringed) = self::vm();
    enable(&ringed, KVM_CAP_DIRTY_LOG_RING, 4096 * 16).unwrap();
    assert_eq!(
        enable(&ringed, KVM_CAP_DIRTY_LOG_RING, 4096 * 16),
        Err(libc::EINVAL)
    );
    // SAFETY: as above.
    unsafe { ringed.set_user_memory_region(region).unwrap() };
    assert_eq!(errno(ringed.get_dirty_log(0, memory.size)), libc::ENXIO);
    assert_eq!(
        errno(ringed.clear_dirty_log(0, 0, 64, &[0])),
        libc::ENXIO,
        "rings and bitmaps exclude each other"
    );
    assert_eq!(
        vm.reset_dirty_rings().map_err(|e| e.errno()),
        Err(libc::EINVAL)
    );
}

#[test]
fn capabilities_check_their_arguments() {
    let (_kvm, vm) = vm();
    for (cap, argument) in [
        (KVM_CAP_X2APIC_API, 4),
        (KVM_CAP_SPLIT_IRQCHIP, 4097),
        (KVM_CAP_DISABLE_QUIRKS2, 1 << 40),
        (KVM_CAP_X86_DISABLE_EXITS, 1 << 9),
        (KVM_CAP_X86_USER_SPACE_MSR, 8),
        (KVM_CAP_EXIT_HYPERCALL, 1),
        (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 2),
        (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 5),
        (KVM_CAP_DIRTY_LOG_RING, 0),
        (KVM_CAP_DIRTY_LOG_RING, 3 * 4096),
        (KVM_CAP_MAX_VCPU_ID, 0),
        (KVM_CAP_MAX_VCPU_ID, 1 << 30),
        (KVM_CAP_HYPERV_SYNIC, 0),
        (9999, 0),
    ] {
        assert_eq!(
            enable(&vm, cap, argument),
            Err(libc::EINVAL),
            "{cap} {argument}"
        );
    }
    assert_eq!(
        enable(&vm, KVM_CAP_DIRTY_LOG_RING, 1 << 30),
        Err(libc::E2BIG)
    );
    let flags = kvm_enable_cap {
        cap: KVM_CAP_EXCEPTION_PAYLOAD,
        flags: 1,
        ..Default::default()
    };
    assert_eq!(errno(vm.enable_cap(&flags)), libc::EINVAL);
    enable(&vm, KVM_CAP_SPLIT_IRQCHIP, 4096).unwrap();
}

#[test]
fn control_words_are_checked() {
    let (_kvm, _vm, vcpu) = with_vcpu(true);
    let debug = vcpu.get_debug_regs().unwrap();
    vcpu.set_debug_regs(&debug).unwrap();
    for bad in [
        kvm_debugregs {
            dr6: 1 << 32,
            ..debug
        },
        kvm_debugregs {
            dr7: 1 << 32,
            ..debug
        },
        kvm_debugregs { flags: 1, ..debug },
    ] {
        assert_eq!(errno(vcpu.set_debug_regs(&bad)), libc::EINVAL);
    }
    let mut xcrs = vcpu.get_xcrs().unwrap();
    vcpu.set_xcrs(&xcrs).unwrap();
    xcrs.xcrs[0].value = 2;
    assert_eq!(errno(vcpu.set_xcrs(&xcrs)), libc::EINVAL);
    xcrs.nr_xcrs = 17;
    assert_eq!(errno(vcpu.set_xcrs(&xcrs)), libc::EINVAL);
    let sregs = vcpu.get_sregs().unwrap();
    for bad in [
        kvm_sregs {
            cr0: 0x8000_0010,
            ..sregs
        },
        kvm_sregs {
            cr0: sregs.cr0 | 1 << 32,
            ..sregs
        },
        kvm_sregs {
            efer: 0x400,
            ..sregs
        },
        kvm_sregs {
            cr0: 0x8000_0011,
            efer: 0x500,
            ..sregs
        },
        kvm_sregs {
            apic_base: 1 << 10,
            ..sregs
        },
        kvm_sregs {
            apic_base: sregs.apic_base | 1,
            ..sregs
        },
    ] {
        assert_eq!(errno(vcpu.set_sregs(&bad)), libc::EINVAL, "{bad:?}");
        assert_eq!(vcpu.get_sregs().unwrap(), sregs, "nothing changed");
    }
    let mut second = vcpu.get_sregs2().unwrap();
    assert_eq!(second.flags, 0);
    second.flags = 1;
    assert_eq!(
        errno(vcpu.set_sregs2(&second)),
        libc::EINVAL,
        "no PAE paging"
    );
    // The registers of PAE paging need not be what is in memory.
    (second.cr0, second.cr4, second.cr3) = (0x8000_0011, 0x20, 0x1000);
    second.pdptrs = [0x5001, 0, 0x6001, 0];
    vcpu.set_sregs2(&second).unwrap();
    assert_eq!(vcpu.get_sregs2().unwrap().pdptrs, second.pdptrs);
    assert_eq!(vcpu.get_sregs2().unwrap().flags, 1);
    let object = Object::Vcpu(&vcpu);
    assert_eq!(number(object, "KVM_RUN", 1), Err(libc::EINVAL));
    let mut mask = [4u32, 0, 0];
    assert_eq!(
        call(object, "KVM_SET_SIGNAL_MASK", &mut mask),
        Err(libc::EINVAL)
    );
    for bad in [0, 33, 1 << 30 | 10] {
        assert_eq!(errno(vcpu.setup_mce(bad)), libc::EINVAL, "{bad:#x}");
    }
    let device = kvm_device_attr {
        attr: 9,
        ..Default::default()
    };
    let mut device = device;
    assert_eq!(
        call(object, "KVM_HAS_DEVICE_ATTR", &mut device),
        Err(libc::ENXIO)
    );
}

/// What user space restores need not be what a controller can hold.
#[test]
fn controllers_take_any_state() {
    let code = assemble(|a| {
        a.mov(rbx, 0xfec0_0000u64)?;
        a.mov(dword_ptr(rbx), 0)?;
        stop(a)?;
        a.sti()?;
        a.nop()?;
        a.cli()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    let set = |chip_id| {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        chip.chip.dummy = [-1; 512];
        machine.vm.set_irqchip(&chip).unwrap();
    };
    (0..3).for_each(set);
    machine.vm.create_pit2(kvm_pit_config::default()).unwrap();
    let mut pit = machine.vm.get_pit2().unwrap();
    for channel in &mut pit.channels {
        (channel.count, channel.mode, channel.rw_mode) = (u32::MAX, 0xff, 0xff);
        (channel.count_load_time, channel.bcd) = (i64::MIN, 0xff);
    }
    machine.vm.set_pit2(&pit).unwrap();
    machine.vm.get_pit2().unwrap();
    match machine.vcpu().run().unwrap() {
        VcpuExit::MmioWrite(0xfec0_0000, _) => {}
        other => panic!("{other:?}"),
    }
    runs_to_stop(&mut machine);
    let mut lapic = machine.vcpu().get_lapic().unwrap();
    lapic.regs.fill(-1);
    machine.vcpu().set_lapic(&lapic).unwrap();
    machine.vcpu().get_lapic().unwrap();
}

#[test]
fn access_bytes_are_set_all_or_none() {
    let (_kvm, vm) = vm();
    let memory = Memory::new(4 * 4096);
    // SAFETY: no guest runs.
    unsafe { vm.set_user_memory_region(memory.region(0, 0)).unwrap() };
    assert_eq!(errno(vm.set_access_bytes(2, &[1, 1, 0])), libc::ENOENT);
    assert_eq!(vm.execution_traps(0, 4).unwrap(), [0; 4]);
    assert_eq!(errno(vm.set_access_bytes(2, &[1, 2])), libc::EINVAL);
    vm.set_access_bytes(1, &[1, 0, 1]).unwrap();
    assert_eq!(vm.execution_traps(0, 4).unwrap(), [0, 1, 0, 1]);
}

#[test]
fn a_refused_request_for_debugging_injects_nothing() {
    let (_kvm, _vm, vcpu) = with_vcpu(false);
    let request = kvm_guest_debug {
        control: KVM_GUESTDBG_INJECT_DB | 1 << 30,
        ..Default::default()
    };
    assert_eq!(errno(vcpu.set_guest_debug(&request)), libc::EINVAL);
    let events = vcpu.get_vcpu_events().unwrap();
    assert_eq!(
        (events.exception.injected, events.exception.pending),
        (0, 0)
    );
    let request = kvm_guest_debug {
        control: KVM_GUESTDBG_INJECT_DB,
        ..Default::default()
    };
    vcpu.set_guest_debug(&request).unwrap();
    assert_eq!(errno(vcpu.set_guest_debug(&request)), libc::EBUSY);
}

#[test]
fn bells_are_refused_as_the_documentation_says() {
    let (_kvm, vm) = vm();
    let bell = EventFd::new(0).unwrap();
    let set = |flags, len, fd| {
        let mut request = kvm_ioeventfd {
            addr: 0x1000,
            len,
            fd,
            flags,
            ..Default::default()
        };
        call(Object::Vm(&vm), "KVM_IOEVENTFD", &mut request)
    };
    use std::os::fd::AsRawFd;
    let fd = bell.as_raw_fd();
    assert_eq!(set(0, 3, fd), Err(libc::EINVAL));
    assert_eq!(set(1, 0, fd), Err(libc::EINVAL), "datamatch of no length");
    assert_eq!(set(1 << 5, 4, fd), Err(libc::EINVAL));
    assert_eq!(set(0, 4, -1), Err(libc::EBADF));
    assert_eq!(set(0, 4, fd), Ok(0));
    assert_eq!(set(0, 4, fd), Err(libc::EEXIST));
    assert_eq!(set(4, 8, fd), Err(libc::ENOENT));
    assert_eq!(set(4, 4, fd), Ok(0));
    assert_eq!(set(4, 4, fd), Err(libc::ENOENT));
}

#[test]
fn a_vm_lives_as_long_as_its_processors() {
    let machine = Machine::new(Irqchip::Full, 1, &assemble(stop));
    let Machine {
        kvm,
        vm,
        mut vcpus,
        memory,
    } = machine;
    drop((vm, kvm));
    match vcpus[0].run().unwrap() {
        VcpuExit::IoOut(0x80, _) => {}
        other => panic!("{other:?}"),
    }
    drop(vcpus);
    drop(memory);
}

#[test]
fn each_file_of_counters_has_a_position_of_its_own() {
    let (_kvm, vm, _vcpu) = with_vcpu(false);
    let read = || {
        let mut file = std::fs::File::from(vm.get_stats_fd().unwrap());
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes.len()
    };
    let first = read();
    assert!(first > 24);
    assert_eq!(read(), first);
}
