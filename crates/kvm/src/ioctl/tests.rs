use super::*;
use crate::Cap;

fn request(kind: Kind, name: &str) -> u32 {
    TABLE
        .iter()
        .find(|row| row.kind == kind && row.name == name)
        .unwrap()
        .request()
}

fn number(answer: Result<Answer>) -> i64 {
    match answer.unwrap() {
        Answer::Value(value) => value,
        other => panic!("{other:?}"),
    }
}

#[test]
fn requests_have_kvm_numbers() {
    for (kind, name, expected) in [
        (Kind::System, "KVM_GET_API_VERSION", 0xae00),
        (Kind::System, "KVM_GET_SUPPORTED_CPUID", 0xc008_ae05),
        (Kind::System, "KVM_GET_MSR_INDEX_LIST", 0xc004_ae02),
        (Kind::Vm, "KVM_SET_USER_MEMORY_REGION", 0x4020_ae46),
        (Kind::Vm, "KVM_IRQ_LINE_STATUS", 0xc008_ae67),
        (Kind::Vm, "KVM_REGISTER_COALESCED_MMIO", 0x4010_ae67),
        (Kind::Vm, "KVM_SET_IRQCHIP", 0x8208_ae63),
        (Kind::Vm, "KVM_GET_CLOCK", 0x8030_ae7c),
        (Kind::Vm, "KVM_ENABLE_CAP", 0x4068_aea3),
        (Kind::Vcpu, "KVM_RUN", 0xae80),
        (Kind::Vcpu, "KVM_GET_REGS", 0x8090_ae81),
        (Kind::Vcpu, "KVM_SET_MSRS", 0x4008_ae89),
        (Kind::Vcpu, "KVM_SET_SIGNAL_MASK", 0x4004_ae8b),
        (Kind::Vcpu, "KVM_GET_XSAVE", 0x9000_aea4),
        (Kind::Vcpu, "KVM_GET_VCPU_EVENTS", 0x8040_ae9f),
        (Kind::Vcpu, "KVM_GET_XCRS", 0x8188_aea6),
    ] {
        assert_eq!(request(kind, name), expected, "{name}");
    }
}

#[test]
fn no_request_is_twice_in_the_table() {
    for (i, a) in TABLE.iter().enumerate() {
        for b in &TABLE[i + 1..] {
            assert!(
                (a.kind, a.request()) != (b.kind, b.request()),
                "{a:?} and {b:?}"
            );
        }
    }
}

#[test]
fn unknown_requests_and_bad_addresses() {
    let kvm = Kvm::new().unwrap();
    let system = Object::System(&kvm);
    assert_eq!(ioctl(system, 0xae99, 0).unwrap_err().errno(), libc::ENOTTY);
    let vm = kvm.create_vm().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(
        ioctl(Object::Vm(&vm), 0xae80, 0).unwrap_err().errno(),
        libc::ENOTTY
    );
    assert!(kvm.check_extension(Cap::UserMemory));
    for row in TABLE.iter().filter(|row| row.direction != Direction::None) {
        for address in [0, 8, 0x7fff_ffff_f000, u64::MAX - 7] {
            let object = match row.kind {
                Kind::System => system,
                Kind::Vm => Object::Vm(&vm),
                Kind::Vcpu => Object::Vcpu(&vcpu),
            };
            // A signal mask may be absent.
            if row.name == "KVM_SET_SIGNAL_MASK" && address == 0 {
                continue;
            }
            let error = ioctl(object, row.request(), address).unwrap_err().errno();
            let expected = [libc::EFAULT, libc::ENXIO, libc::EINVAL];
            assert!(
                expected.contains(&error),
                "{row:?} at {address:#x}: errno {error}"
            );
        }
    }
}

#[test]
fn the_e2big_protocol() {
    let kvm = Kvm::new().unwrap();
    let system = Object::System(&kvm);
    let mut list = vec![0u32; 1];
    let code = request(Kind::System, "KVM_GET_MSR_INDEX_LIST");
    let error = ioctl(system, code, list.as_mut_ptr() as u64).unwrap_err();
    assert_eq!(error.errno(), libc::E2BIG);
    let count = list[0];
    list.resize(1 + count as usize, 0);
    assert_eq!(number(ioctl(system, code, list.as_mut_ptr() as u64)), 0);
    assert!(list[1..].contains(&arch::msr::EFER));
    let mut cpuid = vec![0u32; 2 + 10 * 256];
    cpuid[0] = 1;
    let code = request(Kind::System, "KVM_GET_SUPPORTED_CPUID");
    let error = ioctl(system, code, cpuid.as_mut_ptr() as u64).unwrap_err();
    assert_eq!(error.errno(), libc::E2BIG);
    cpuid[0] = 256;
    assert_eq!(number(ioctl(system, code, cpuid.as_mut_ptr() as u64)), 0);
    assert!(cpuid[0] > 10 && cpuid[0] < 256);
}

#[test]
fn every_listed_msr_can_be_read_and_written_back() {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(256).unwrap())
        .unwrap();
    for index in crate::msrs::index_list() {
        let mut entry = [kvm_bindings::kvm_msr_entry {
            index,
            ..Default::default()
        }];
        assert_eq!(vcpu.read_msrs(&mut entry).unwrap(), 1, "reading {index:#x}");
        assert_eq!(vcpu.write_msrs(&entry).unwrap(), 1, "writing {index:#x}");
    }
}

#[test]
fn a_dead_vm_answers_eio() {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    vm.inner().bug("a test says so");
    for row in TABLE.iter() {
        let object = match row.kind {
            Kind::System => continue,
            Kind::Vm => Object::Vm(&vm),
            Kind::Vcpu => Object::Vcpu(&vcpu),
        };
        assert_eq!(
            ioctl(object, row.request(), 0).unwrap_err().errno(),
            libc::EIO,
            "{row:?}"
        );
    }
    kvm.create_vm().unwrap();
}

/// A vCPU that runs, or sleeps, when its VM dies comes back; others go on.
#[test]
fn a_dying_vm_gives_its_vcpus_back() {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let other = kvm.create_vm().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_mp_state(kvm_bindings::kvm_mp_state {
        mp_state: kvm_bindings::KVM_MP_STATE_HALTED,
    })
    .unwrap();
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| vcpu.inner().run());
        std::thread::sleep(std::time::Duration::from_millis(20));
        vm.inner().bug("a test says so");
        let error = sleeper.join().unwrap().unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
    });
    other.create_vcpu(0).unwrap();
}

#[test]
fn the_document_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/kvm-api.md");
    let text = documentation();
    if std::env::var_os("EPTIDE_BLESS").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(
        committed, text,
        "run with BLESS=1 and review the difference"
    );
}

#[test]
fn the_system_tells_its_extended_state() {
    let kvm = Kvm::new().unwrap();
    let system = Object::System(&kvm);
    let mut components = 0u64;
    let mut attribute = kvm_bindings::kvm_device_attr {
        addr: &raw mut components as u64,
        ..Default::default()
    };
    let get = request(Kind::System, "KVM_GET_DEVICE_ATTR");
    let at = &raw mut attribute as u64;
    assert_eq!(number(ioctl(system, get, at)), 0);
    assert_eq!(components, crate::cpuid::supported_xcr0());
    attribute.attr = 1;
    let at = &raw mut attribute as u64;
    let has = request(Kind::System, "KVM_HAS_DEVICE_ATTR");
    assert_eq!(ioctl(system, has, at).unwrap_err().errno(), libc::ENXIO);
}
