//! Calls about vCPUs and what a VM has for all of them: clocks, registers, events, capabilities.

use crate::common::*;
use crate::{call, errno, number, vm, with_vcpu};
use eptide_kvm as kvm;
use kvm::VcpuExit;
use kvm::ioctl::Object;
use kvm_bindings::*;
use std::io::Read;

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
