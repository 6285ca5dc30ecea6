//! What existing virtual machine monitors ask of KVM: capabilities without which they refuse to
//! run, and the ioctls they use, against the table and the answers here.

use eptide_kvm::Kvm;
use eptide_kvm::ioctl::{Answer, Kind, Object, TABLE, ioctl};
use kvm_bindings::*;

const QEMU: &[u32] = &[
    KVM_CAP_USER_MEMORY,
    KVM_CAP_DESTROY_MEMORY_REGION_WORKS,
    KVM_CAP_JOIN_MEMORY_REGIONS_WORKS,
    KVM_CAP_SET_TSS_ADDR,
    KVM_CAP_EXT_CPUID,
    KVM_CAP_MP_STATE,
    KVM_CAP_IRQFD,
    KVM_CAP_INTERNAL_ERROR_DATA,
    KVM_CAP_IOEVENTFD,
    KVM_CAP_IOEVENTFD_ANY_LENGTH,
    KVM_CAP_SIGNAL_MSI,
    KVM_CAP_IRQ_ROUTING,
    KVM_CAP_DEBUGREGS,
    KVM_CAP_XSAVE,
    KVM_CAP_VCPU_EVENTS,
    KVM_CAP_X86_ROBUST_SINGLESTEP,
    KVM_CAP_MCE,
    KVM_CAP_ADJUST_CLOCK,
    KVM_CAP_SET_IDENTITY_MAP_ADDR,
];

const FIRECRACKER: &[u32] = &[
    KVM_CAP_IRQCHIP,
    KVM_CAP_IOEVENTFD,
    KVM_CAP_IRQFD,
    KVM_CAP_USER_MEMORY,
    KVM_CAP_SET_TSS_ADDR,
    KVM_CAP_PIT2,
    KVM_CAP_PIT_STATE2,
    KVM_CAP_ADJUST_CLOCK,
    KVM_CAP_DEBUGREGS,
    KVM_CAP_MP_STATE,
    KVM_CAP_VCPU_EVENTS,
    KVM_CAP_XCRS,
    KVM_CAP_XSAVE,
    KVM_CAP_EXT_CPUID,
];

const CLOUD_HYPERVISOR: &[u32] = &[
    KVM_CAP_ADJUST_CLOCK,
    KVM_CAP_EXT_CPUID,
    KVM_CAP_GET_TSC_KHZ,
    KVM_CAP_IMMEDIATE_EXIT,
    KVM_CAP_IOEVENTFD,
    KVM_CAP_IRQCHIP,
    KVM_CAP_IRQFD,
    KVM_CAP_IRQ_ROUTING,
    KVM_CAP_MP_STATE,
    KVM_CAP_SET_IDENTITY_MAP_ADDR,
    KVM_CAP_SET_TSS_ADDR,
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_TSC_DEADLINE_TIMER,
    KVM_CAP_USER_MEMORY,
    KVM_CAP_USER_NMI,
    KVM_CAP_VCPU_EVENTS,
    KVM_CAP_XSAVE,
];

const KVMTOOL: &[u32] = &[
    KVM_CAP_COALESCED_MMIO,
    KVM_CAP_SET_TSS_ADDR,
    KVM_CAP_PIT2,
    KVM_CAP_USER_MEMORY,
    KVM_CAP_IRQ_ROUTING,
    KVM_CAP_IRQCHIP,
    KVM_CAP_HLT,
    KVM_CAP_IRQ_INJECT_STATUS,
    KVM_CAP_EXT_CPUID,
];

/// Features that are not here. KVM kernels without them answer 0 and ENOTTY, and monitors go on.
const ABSENT: &[u32] = &[
    KVM_CAP_XEN_HVM,
    KVM_CAP_HYPERV,
    KVM_CAP_HYPERV_SYNIC,
    KVM_CAP_HYPERV_CPUID,
    KVM_CAP_NESTED_STATE,
    KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CAP_GUEST_MEMFD,
    KVM_CAP_PMU_CAPABILITY,
    KVM_CAP_SGX_ATTRIBUTE,
    KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM,
    KVM_CAP_IOMMU,
];

/// Every ioctl that a monitor needs at its start, gates by a capability that is offered, uses at
/// run time, or for snapshots, migration and debugging.
const USED: &[(Kind, &[&str])] = &[
    (
        Kind::System,
        &[
            "KVM_GET_API_VERSION",
            "KVM_CHECK_EXTENSION",
            "KVM_CREATE_VM",
            "KVM_GET_VCPU_MMAP_SIZE",
            "KVM_GET_SUPPORTED_CPUID",
            "KVM_GET_EMULATED_CPUID",
            "KVM_GET_MSR_INDEX_LIST",
            "KVM_GET_MSR_FEATURE_INDEX_LIST",
            "KVM_GET_MSRS",
            "KVM_X86_GET_MCE_CAP_SUPPORTED",
            "KVM_GET_DEVICE_ATTR",
            "KVM_HAS_DEVICE_ATTR",
        ],
    ),
    (
        Kind::Vm,
        &[
            "KVM_CHECK_EXTENSION",
            "KVM_CREATE_VCPU",
            "KVM_SET_USER_MEMORY_REGION",
            "KVM_SET_USER_MEMORY_REGION2",
            "KVM_SET_TSS_ADDR",
            "KVM_SET_IDENTITY_MAP_ADDR",
            "KVM_CREATE_IRQCHIP",
            "KVM_CREATE_PIT2",
            "KVM_ENABLE_CAP",
            "KVM_SET_GSI_ROUTING",
            "KVM_IRQ_LINE",
            "KVM_IRQ_LINE_STATUS",
            "KVM_IRQFD",
            "KVM_IOEVENTFD",
            "KVM_SIGNAL_MSI",
            "KVM_GET_IRQCHIP",
            "KVM_SET_IRQCHIP",
            "KVM_GET_PIT2",
            "KVM_SET_PIT2",
            "KVM_SET_TSC_KHZ",
            "KVM_GET_TSC_KHZ",
            "KVM_GET_CLOCK",
            "KVM_SET_CLOCK",
            "KVM_REGISTER_COALESCED_MMIO",
            "KVM_UNREGISTER_COALESCED_MMIO",
            "KVM_GET_DIRTY_LOG",
            "KVM_CLEAR_DIRTY_LOG",
            "KVM_RESET_DIRTY_RINGS",
            "KVM_CREATE_DEVICE",
            "KVM_X86_SET_MSR_FILTER",
            "KVM_GET_STATS_FD",
            "KVM_REINJECT_CONTROL",
            "KVM_SET_NR_MMU_PAGES",
            "KVM_GET_NR_MMU_PAGES",
            "KVM_SET_BOOT_CPU_ID",
        ],
    ),
    (
        Kind::Vcpu,
        &[
            "KVM_RUN",
            "KVM_SET_CPUID2",
            "KVM_GET_CPUID2",
            "KVM_GET_REGS",
            "KVM_SET_REGS",
            "KVM_GET_SREGS",
            "KVM_SET_SREGS",
            "KVM_GET_SREGS2",
            "KVM_SET_SREGS2",
            "KVM_GET_MSRS",
            "KVM_SET_MSRS",
            "KVM_GET_FPU",
            "KVM_SET_FPU",
            "KVM_GET_XSAVE",
            "KVM_SET_XSAVE",
            "KVM_GET_XSAVE2",
            "KVM_GET_XCRS",
            "KVM_SET_XCRS",
            "KVM_GET_LAPIC",
            "KVM_SET_LAPIC",
            "KVM_GET_MP_STATE",
            "KVM_SET_MP_STATE",
            "KVM_GET_VCPU_EVENTS",
            "KVM_SET_VCPU_EVENTS",
            "KVM_GET_DEBUGREGS",
            "KVM_SET_DEBUGREGS",
            "KVM_X86_SETUP_MCE",
            "KVM_X86_SET_MCE",
            "KVM_GET_TSC_KHZ",
            "KVM_SET_TSC_KHZ",
            "KVM_KVMCLOCK_CTRL",
            "KVM_NMI",
            "KVM_SMI",
            "KVM_INTERRUPT",
            "KVM_SET_SIGNAL_MASK",
            "KVM_TPR_ACCESS_REPORTING",
            "KVM_SET_VAPIC_ADDR",
            "KVM_SET_GUEST_DEBUG",
            "KVM_TRANSLATE",
            "KVM_GET_STATS_FD",
            "KVM_ENABLE_CAP",
            "KVM_GET_DEVICE_ATTR",
            "KVM_SET_DEVICE_ATTR",
            "KVM_HAS_DEVICE_ATTR",
        ],
    ),
];

/// What a descriptor of `/dev/kvm` or of a VM answers to KVM_CHECK_EXTENSION.
fn check(object: Object<'_>, capability: u32) -> i64 {
    const CHECK_EXTENSION: u32 = 0xae03;
    match ioctl(object, CHECK_EXTENSION, capability.into()).unwrap() {
        Answer::Value(value) => value,
        other => panic!("{other:?}"),
    }
}

#[test]
fn required_capabilities_are_there() {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    for (monitor, capabilities) in [
        ("QEMU", QEMU),
        ("Firecracker", FIRECRACKER),
        ("Cloud Hypervisor", CLOUD_HYPERVISOR),
        ("kvmtool", KVMTOOL),
    ] {
        for &capability in capabilities {
            for object in [Object::System(&kvm), Object::Vm(&vm)] {
                let value = check(object, capability);
                assert!(value > 0, "{monitor} needs capability {capability}");
            }
        }
    }
    // kvmtool finds the ring by the value.
    assert_eq!(check(Object::Vm(&vm), KVM_CAP_COALESCED_MMIO), 2);
}

#[test]
fn absent_features_say_so() {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    for &capability in ABSENT {
        assert_eq!(check(Object::System(&kvm), capability), 0, "{capability}");
        assert_eq!(check(Object::Vm(&vm), capability), 0, "{capability}");
        assert!(TABLE.iter().all(|row| {
            row.capability
                .is_none_or(|(_, number)| number != capability)
        }));
    }
}

#[test]
fn every_ioctl_in_use_has_a_row() {
    for (kind, names) in USED {
        for name in *names {
            let found = TABLE
                .iter()
                .any(|row| row.kind == *kind && row.name == *name);
            assert!(found, "{kind:?} {name}");
        }
    }
}

#[test]
fn what_a_row_names_is_announced() {
    let kvm = Kvm::new().unwrap();
    for row in TABLE {
        if let Some((name, number)) = row.capability {
            assert_ne!(check(Object::System(&kvm), number), 0, "{row:?}: {name}");
        }
    }
}

/// A KVM without VFIO knows no device type.
#[test]
fn no_device_can_be_created() {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    let row = TABLE.iter().find(|row| row.name == "KVM_CREATE_DEVICE");
    for flags in [0, KVM_CREATE_DEVICE_TEST] {
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            fd: 0,
            flags,
        };
        let at = &raw mut device as u64;
        let error = ioctl(Object::Vm(&vm), row.unwrap().request(), at).unwrap_err();
        assert_eq!(error.errno(), libc::ENODEV);
    }
}

#[test]
fn the_deadline_timer_is_announced_by_its_capability_alone() {
    // QEMU with its own local APIC, which has no such timer, would offer it otherwise.
    let supported = Kvm::new().unwrap().get_supported_cpuid(256).unwrap();
    let leaf = supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == 1);
    assert_eq!(leaf.unwrap().ecx & 1 << 24, 0);
}
