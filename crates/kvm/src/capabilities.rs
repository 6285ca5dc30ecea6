//! What KVM_CHECK_EXTENSION answers.
//!
//! A capability is listed with what it is worth and, where KVM_ENABLE_CAP takes it, with the
//! function that enables it. What is not listed is absent, and answers 0.

use crate::cpuid;
use crate::error::{Result, fail};
use crate::vm::{MAX_SLOTS, MAX_VCPU_ID, MAX_VCPUS, Vm};
use kvm_bindings::*;

/// Capability of Eptide's own: execution traps by page.
pub const CAP_EXECUTION_TRAPS: u32 = 0x4550_0001;

/// X86_QUIRKs that can be disabled.
const QUIRKS: u64 = (KVM_X86_QUIRK_LINT0_REENABLED
    | KVM_X86_QUIRK_CD_NW_CLEARED
    | KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    | KVM_X86_QUIRK_OUT_7E_INC_RIP
    | KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    | KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS) as u64;
/// Exits that can be disabled. PAUSE never exits. A processor without MWAIT has no exits of it to
/// disable, and there are no C-states to hand over.
const DISABLED_EXITS: u32 = KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_PAUSE;
/// Hypercalls that can be made to exit: KVM_HC_MAP_GPA_RANGE.
const EXIT_HYPERCALLS: u64 = 1 << 12;
const MSR_REASONS: u32 =
    KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER;
const X2APIC_FLAGS: u64 =
    (KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK) as u64;

/// The value of a capability.
pub(crate) fn check(capability: u32) -> i32 {
    match capability {
        KVM_CAP_IRQCHIP
        | KVM_CAP_HLT
        | KVM_CAP_MMU_SHADOW_CACHE_CONTROL
        | KVM_CAP_USER_MEMORY
        | KVM_CAP_SET_TSS_ADDR
        | KVM_CAP_EXT_CPUID
        | KVM_CAP_CLOCKSOURCE
        | KVM_CAP_PIT
        | KVM_CAP_NOP_IO_DELAY
        | KVM_CAP_MP_STATE
        | KVM_CAP_DESTROY_MEMORY_REGION_WORKS
        | KVM_CAP_USER_NMI
        | KVM_CAP_SET_GUEST_DEBUG
        | KVM_CAP_REINJECT_CONTROL
        | KVM_CAP_IRQ_INJECT_STATUS
        | KVM_CAP_JOIN_MEMORY_REGIONS_WORKS
        | KVM_CAP_IRQFD
        | KVM_CAP_PIT2
        | KVM_CAP_SET_BOOT_CPU_ID
        | KVM_CAP_PIT_STATE2
        | KVM_CAP_IOEVENTFD
        | KVM_CAP_SET_IDENTITY_MAP_ADDR
        | KVM_CAP_INTERNAL_ERROR_DATA
        | KVM_CAP_VCPU_EVENTS
        | KVM_CAP_DEBUGREGS
        | KVM_CAP_X86_ROBUST_SINGLESTEP
        | KVM_CAP_ENABLE_CAP
        | KVM_CAP_XSAVE
        | KVM_CAP_GET_TSC_KHZ
        | KVM_CAP_TSC_CONTROL
        | KVM_CAP_TSC_DEADLINE_TIMER
        | KVM_CAP_KVMCLOCK_CTRL
        | KVM_CAP_SIGNAL_MSI
        | KVM_CAP_READONLY_MEM
        | KVM_CAP_IRQFD_RESAMPLE
        | KVM_CAP_IOAPIC_POLARITY_IGNORED
        | KVM_CAP_ENABLE_CAP_VM
        | KVM_CAP_IOEVENTFD_NO_LENGTH
        | KVM_CAP_IOEVENTFD_ANY_LENGTH
        | KVM_CAP_CHECK_EXTENSION_VM
        | KVM_CAP_DISABLE_QUIRKS
        | KVM_CAP_SPLIT_IRQCHIP
        | KVM_CAP_IMMEDIATE_EXIT
        | KVM_CAP_GET_MSR_FEATURES
        | KVM_CAP_MSR_PLATFORM_INFO
        | KVM_CAP_ENFORCE_PV_FEATURE_CPUID
        | KVM_CAP_COALESCED_PIO
        | KVM_CAP_EXCEPTION_PAYLOAD
        | KVM_CAP_X86_MSR_FILTER
        | KVM_CAP_SREGS2
        | KVM_CAP_EXIT_ON_EMULATION_FAILURE
        | KVM_CAP_X86_TRIPLE_FAULT_EVENT
        | KVM_CAP_VM_TSC_CONTROL
        | KVM_CAP_MEMORY_FAULT_INFO
        | KVM_CAP_USER_MEMORY2
        | KVM_CAP_BINARY_STATS_FD
        | KVM_CAP_VCPU_ATTRIBUTES
        | KVM_CAP_STEAL_TIME
        | KVM_CAP_ASYNC_PF
        | KVM_CAP_ASYNC_PF_INT
        | KVM_CAP_SYS_ATTRIBUTES
        | KVM_CAP_X86_SMM
        | KVM_CAP_VAPIC
        | KVM_CAP_INTR_SHADOW
        | KVM_CAP_DEVICE_CTRL
        | CAP_EXECUTION_TRAPS => 1,
        KVM_CAP_XCRS => (cpuid::supported_xcr0() != 0) as i32,
        KVM_CAP_DIRTY_LOG_RING | KVM_CAP_DIRTY_LOG_RING_ACQ_REL => {
            crate::dirty_ring::MAX_BYTES as i32
        }
        KVM_CAP_XSAVE2 => 4096,
        KVM_CAP_MCE => crate::msrs::MCE_BANKS as i32,
        KVM_CAP_NR_VCPUS => std::thread::available_parallelism().map_or(1, |n| n.get()) as i32,
        KVM_CAP_MAX_VCPUS => MAX_VCPUS as i32,
        KVM_CAP_MAX_VCPU_ID => MAX_VCPU_ID as i32,
        KVM_CAP_NR_MEMSLOTS => MAX_SLOTS as i32,
        KVM_CAP_COALESCED_MMIO => KVM_COALESCED_MMIO_PAGE_OFFSET as i32,
        KVM_CAP_IRQ_ROUTING => crate::irqchip::routing::MAX_ROUTES as i32,
        KVM_CAP_ADJUST_CLOCK => {
            (KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC) as i32
        }
        KVM_CAP_SYNC_REGS => KVM_SYNC_X86_VALID_FIELDS as i32,
        KVM_CAP_SYNC_MMU => 1,
        KVM_CAP_MULTI_ADDRESS_SPACE => mmu::AddressSpace::ALL.len() as i32,
        KVM_CAP_X2APIC_API => X2APIC_FLAGS as i32,
        KVM_CAP_X86_DISABLE_EXITS => DISABLED_EXITS as i32,
        KVM_CAP_DISABLE_QUIRKS2 => QUIRKS as i32,
        KVM_CAP_X86_USER_SPACE_MSR => MSR_REASONS as i32,
        KVM_CAP_EXIT_HYPERCALL => EXIT_HYPERCALLS as i32,
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => {
            (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET) as i32
        }
        KVM_CAP_SET_GUEST_DEBUG2 => {
            (KVM_GUESTDBG_ENABLE
                | KVM_GUESTDBG_SINGLESTEP
                | KVM_GUESTDBG_USE_SW_BP
                | KVM_GUESTDBG_USE_HW_BP
                | KVM_GUESTDBG_INJECT_DB
                | KVM_GUESTDBG_INJECT_BP
                | KVM_GUESTDBG_BLOCKIRQ) as i32
        }
        KVM_CAP_VM_TYPES => 1,
        _ => 0,
    }
}

/// Whether a capability's value says something about the host.
pub(crate) fn depends_on_host(capability: u32) -> bool {
    matches!(capability, KVM_CAP_NR_VCPUS | KVM_CAP_XCRS)
}

/// KVM_ENABLE_CAP on a VM.
pub(crate) fn enable(vm: &Vm, request: &kvm_enable_cap) -> Result<()> {
    if request.flags != 0 {
        return fail(libc::EINVAL);
    }
    let value = request.args[0];
    let reject_unknown = |known: u64| {
        if value & !known != 0 {
            fail(libc::EINVAL)
        } else {
            Ok(())
        }
    };
    match request.cap {
        KVM_CAP_DISABLE_QUIRKS | KVM_CAP_DISABLE_QUIRKS2 => {
            if request.cap == KVM_CAP_DISABLE_QUIRKS2 {
                reject_unknown(QUIRKS)?;
            }
            vm.update_settings(|s| s.disabled_quirks = value & QUIRKS);
        }
        KVM_CAP_SPLIT_IRQCHIP => return vm.split_irqchip(value),
        KVM_CAP_DIRTY_LOG_RING | KVM_CAP_DIRTY_LOG_RING_ACQ_REL => {
            return vm.enable_dirty_rings(value);
        }
        KVM_CAP_X2APIC_API => {
            reject_unknown(X2APIC_FLAGS)?;
            let wide = value & KVM_X2APIC_API_USE_32BIT_IDS as u64 != 0;
            let no_quirk = value & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK as u64 != 0;
            vm.update_settings(|s| s.x2apic_wide |= wide);
            if no_quirk {
                vm.disable_broadcast_quirk();
            }
            if let Some(chip) = vm.irqchip().filter(|_| wide) {
                chip.set_wide();
            }
        }
        KVM_CAP_X86_DISABLE_EXITS => {
            reject_unknown(DISABLED_EXITS as u64)?;
            if vm.has_vcpus() {
                return fail(libc::EINVAL);
            }
            let hlt = value & KVM_X86_DISABLE_EXITS_HLT as u64 != 0;
            vm.update_settings(|s| s.halts_in_guest |= hlt);
        }
        KVM_CAP_MSR_PLATFORM_INFO => vm.update_settings(|s| s.hides_platform_info = value == 0),
        KVM_CAP_EXCEPTION_PAYLOAD => vm.update_settings(|s| s.exception_payload = value != 0),
        KVM_CAP_X86_TRIPLE_FAULT_EVENT => {
            vm.update_settings(|s| s.triple_fault_event = value != 0);
        }
        KVM_CAP_X86_USER_SPACE_MSR => {
            reject_unknown(MSR_REASONS as u64)?;
            vm.update_settings(|s| s.user_space_msrs = value as u32);
        }
        KVM_CAP_EXIT_HYPERCALL => {
            reject_unknown(EXIT_HYPERCALLS)?;
            vm.update_settings(|s| s.exit_hypercalls = value);
        }
        KVM_CAP_EXIT_ON_EMULATION_FAILURE => {
            reject_unknown(1)?;
            vm.update_settings(|s| s.exit_on_emulation_failure = value != 0);
        }
        KVM_CAP_MAX_VCPU_ID => {
            // Set once, before there are vCPUs; the same again changes nothing.
            let settings = vm.settings();
            if settings.max_vcpu_id.map(u64::from) == Some(value) {
                return Ok(());
            }
            let is_open = !vm.has_vcpus() && settings.max_vcpu_id.is_none();
            let least = settings.boot_vcpu.max(1) as u64;
            if !is_open || !(least..=MAX_VCPU_ID as u64).contains(&value) {
                return fail(libc::EINVAL);
            }
            vm.update_settings(|s| s.max_vcpu_id = Some(value as u32));
        }
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => {
            let enable = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as u64;
            let initially = KVM_DIRTY_LOG_INITIALLY_SET as u64;
            reject_unknown(enable | initially)?;
            if value & initially != 0 && value & enable == 0 {
                return fail(libc::EINVAL);
            }
            vm.update_settings(|s| s.manual_dirty_log = value);
            vm.mmu.set_dirty_log_initially_set(value & initially != 0);
        }
        _ => return fail(libc::EINVAL),
    }
    Ok(())
}
