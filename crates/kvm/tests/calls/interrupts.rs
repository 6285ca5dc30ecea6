//! Calls about interrupt controllers, lines and messages.

use crate::common::*;
use crate::{call, errno, vm, with_vcpu};
use eptide_kvm as kvm;
use kvm::VcpuExit;
use kvm::ioctl::Object;
use kvm_bindings::*;
use vmm_sys_util::eventfd::EventFd;

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
