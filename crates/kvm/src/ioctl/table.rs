//! The table of ioctls.

use super::Answer;
use super::user_memory::{read, read_array, write, write_array};
use crate::api::{Kvm, VcpuFd, VmFd};
use crate::error::{Error, Result, fail};
use crate::msr_filter::Range;
use crate::run_area::RUN_SIZE;
use crate::traps::AccessBytes;
use crate::{capabilities, cpuid, msrs};
use kvm_bindings::*;
use std::mem::offset_of;

use crate::CAP_EXECUTION_TRAPS as EPTIDE_CAP_EXECUTION_TRAPS;

/// The object an ioctl is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/dev/kvm`.
    System,
    /// A VM.
    Vm,
    /// A vCPU.
    Vcpu,
}

/// Which way the argument goes, as the request number says. KVM's numbers are not always
/// truthful.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// No structure: a number or nothing.
    None,
    /// To the kernel.
    Write,
    /// From the kernel.
    Read,
    /// Both.
    Both,
}

/// What carries an ioctl out.
#[derive(Clone, Copy)]
pub(super) enum Handler {
    System(fn(&Kvm, u64) -> Result<Answer>),
    Vm(fn(&VmFd, u64) -> Result<Answer>),
    Vcpu(fn(&VcpuFd, u64) -> Result<Answer>),
}

/// One ioctl.
pub struct Row {
    /// Its object.
    pub kind: Kind,
    /// Its number.
    pub number: u8,
    /// Direction of the argument.
    pub direction: Direction,
    /// Size of the argument.
    pub size: u32,
    /// Its name.
    pub name: &'static str,
    /// Name and number of the capability that announces it.
    pub capability: Option<(&'static str, u32)>,
    /// What it does here, in a sentence.
    pub doc: &'static str,
    pub(super) handler: Handler,
}

impl std::fmt::Debug for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

macro_rules! direction {
    (none) => {
        (Direction::None, 0)
    };
    (write $type:ty) => {
        (Direction::Write, size_of::<$type>() as u32)
    };
    (read $type:ty) => {
        (Direction::Read, size_of::<$type>() as u32)
    };
    (both $type:ty) => {
        (Direction::Both, size_of::<$type>() as u32)
    };
}

macro_rules! table {
    ($($kind:ident { $($number:literal $name:ident ($($argument:tt)*) [$($capability:ident)?] $doc:literal => $handler:expr;)* })*) => {
        /// Every ioctl.
        pub static TABLE: &[Row] = &[$($(
            Row {
                kind: Kind::$kind,
                number: $number,
                direction: direction!($($argument)*).0,
                size: direction!($($argument)*).1,
                name: stringify!($name),
                capability: [$(Some((stringify!($capability), $capability)),)? None][0],
                doc: $doc,
                handler: Handler::$kind($handler),
            },
        )*)*];
    };
}

const DONE: Result<Answer> = Ok(Answer::Value(0));

fn value(value: impl Into<i64>) -> Result<Answer> {
    Ok(Answer::Value(value.into()))
}

/// Writes a result to the caller.
fn give<T: super::user_memory::Plain>(address: u64, result: Result<T>) -> Result<Answer> {
    write(address, &result?)?;
    DONE
}

/// Takes an argument from the caller.
fn take<T: super::user_memory::Plain>(
    address: u64,
    then: impl FnOnce(T) -> Result<()>,
) -> Result<Answer> {
    then(read(address)?)?;
    DONE
}

/// Length of the fixed part of the structures that end in an array.
const HEADER: u64 = 8;

/// A list of MSR numbers: the count always goes back, the numbers if there is room.
fn give_indices(address: u64, all: &[u32]) -> Result<Answer> {
    let room: u32 = read(address)?;
    write(address, &(all.len() as u32))?;
    if (room as usize) < all.len() {
        return fail(libc::E2BIG);
    }
    write_array(address + offset_of!(kvm_msr_list, indices) as u64, all)?;
    DONE
}

fn give_cpuid(address: u64, all: &[kvm_cpuid_entry2]) -> Result<Answer> {
    let [room, _]: [u32; 2] = read(address)?;
    if (room as usize) < all.len() {
        return fail(libc::E2BIG);
    }
    write_array(address + HEADER, all)?;
    write(address, &(all.len() as u32))?;
    DONE
}

fn take_cpuid(vcpu: &VcpuFd, address: u64) -> Result<Answer> {
    let [count, _]: [u32; 2] = read(address)?;
    if count as usize > KVM_MAX_CPUID_ENTRIES {
        return fail(libc::E2BIG);
    }
    let entries: Vec<kvm_cpuid_entry2> = read_array(address + HEADER, count as usize)?;
    vcpu.set_cpuid_entries(&entries)?;
    DONE
}

/// KVM_SET_CPUID's entries have no sub-leaf.
fn take_cpuid_without_index(vcpu: &VcpuFd, address: u64) -> Result<Answer> {
    let [count, _]: [u32; 2] = read(address)?;
    if count as usize > KVM_MAX_CPUID_ENTRIES {
        return fail(libc::E2BIG);
    }
    let entries: Vec<kvm_cpuid_entry> = read_array(address + HEADER, count as usize)?;
    let entries: Vec<_> = entries
        .iter()
        .map(|e| kvm_cpuid_entry2 {
            function: e.function,
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            ..Default::default()
        })
        .collect();
    vcpu.set_cpuid_entries(&entries)?;
    DONE
}

/// The most MSRs of one call.
const MAX_IO_MSRS: u32 = 256;

fn take_msrs(address: u64) -> Result<Vec<kvm_msr_entry>> {
    let [count, _]: [u32; 2] = read(address)?;
    if count >= MAX_IO_MSRS {
        return fail(libc::E2BIG);
    }
    read_array(address + HEADER, count as usize)
}

fn get_dirty_log(vm: &VmFd, address: u64) -> Result<Answer> {
    let log: kvm_dirty_log = read(address)?;
    // SAFETY: both members of the union are the same address.
    let bitmap = unsafe { log.__bindgen_anon_1.padding2 };
    vm.check_bitmaps()?;
    let pages = vm.slot_pages(log.slot)?;
    let words = vm.get_dirty_log(log.slot, pages as usize * 4096)?;
    write_array(bitmap, &words)?;
    DONE
}

fn clear_dirty_log(vm: &VmFd, address: u64) -> Result<Answer> {
    let log: kvm_clear_dirty_log = read(address)?;
    vm.check_bitmaps()?;
    if log.first_page & 63 != 0 {
        return fail(libc::EINVAL);
    }
    let pages = vm.slot_pages(log.slot)?;
    if log.num_pages as u64 > pages {
        return fail(libc::EINVAL);
    }
    // SAFETY: both members of the union are the same address.
    let bitmap = unsafe { log.__bindgen_anon_1.padding2 };
    let words: Vec<u64> = read_array(bitmap, (log.num_pages as usize).div_ceil(64))?;
    vm.clear_dirty_log(log.slot, log.first_page, log.num_pages, &words)?;
    DONE
}

fn set_msr_filter(vm: &VmFd, address: u64) -> Result<Answer> {
    let filter: kvm_msr_filter = read(address)?;
    let mut ranges = Vec::new();
    for range in filter.ranges.iter().filter(|range| range.nmsrs != 0) {
        let bytes = range.nmsrs.div_ceil(8);
        if bytes > KVM_MSR_FILTER_MAX_BITMAP_SIZE {
            return fail(libc::EINVAL);
        }
        let bitmap = read_array(range.bitmap as u64, bytes as usize)?;
        let (flags, base, count) = (range.flags, range.base, range.nmsrs);
        ranges.push(Range {
            flags,
            base,
            count,
            bitmap,
        });
    }
    vm.install_msr_filter(filter.flags, ranges)?;
    DONE
}

fn irq_line(vm: &VmFd, address: u64) -> Result<i32> {
    let level: kvm_irq_level = read(address)?;
    // SAFETY: both members of the union are 32-bit integers.
    let gsi = unsafe { level.__bindgen_anon_1.irq };
    vm.set_irq_line_status(gsi, level.level != 0)
}

fn set_gsi_routing(vm: &VmFd, address: u64) -> Result<Answer> {
    let [count, flags]: [u32; 2] = read(address)?;
    if vm.inner().irqchip().is_none() || count as usize > crate::irqchip::routing::MAX_ROUTES {
        return fail(libc::EINVAL);
    }
    let entries: Vec<kvm_irq_routing_entry> = read_array(address + HEADER, count as usize)?;
    vm.inner().set_routing(flags, &entries)?;
    DONE
}

fn set_signal_mask(vcpu: &VcpuFd, address: u64) -> Result<Answer> {
    if address == 0 {
        vcpu.set_signal_mask(None)?;
        return DONE;
    }
    let length: u32 = read(address)?;
    if length as usize != size_of::<u64>() {
        return fail(libc::EINVAL);
    }
    vcpu.set_signal_mask(Some(read(address + 4)?))?;
    DONE
}

fn memory_region2(vm: &VmFd, address: u64) -> Result<Answer> {
    let region: kvm_userspace_memory_region2 = read(address)?;
    if region.flags & KVM_MEM_GUEST_MEMFD != 0 {
        return fail(libc::EINVAL);
    }
    vm.inner().set_memory_region(&kvm_userspace_memory_region {
        slot: region.slot,
        flags: region.flags,
        guest_phys_addr: region.guest_phys_addr,
        memory_size: region.memory_size,
        userspace_addr: region.userspace_addr,
    })?;
    DONE
}

fn get_access(vm: &VmFd, address: u64) -> Result<Answer> {
    let request: AccessBytes = read(address)?;
    let bytes = vm.execution_traps(request.first_gfn, request.count)?;
    write_array(request.access, &bytes)?;
    DONE
}

fn set_access(vm: &VmFd, address: u64) -> Result<Answer> {
    let request: AccessBytes = read(address)?;
    let count = request.checked_count()?;
    let bytes: Vec<u8> = read_array(request.access, count)?;
    vm.set_access_bytes(request.first_gfn, &bytes)?;
    DONE
}

/// GET and SET of the TSC offset, the one attribute of vCPUs.
fn tsc_attribute(attribute: &kvm_device_attr) -> Result<()> {
    let known = attribute.group == KVM_VCPU_TSC_CTRL
        && attribute.attr == KVM_VCPU_TSC_OFFSET as u64
        && attribute.flags == 0;
    if known { Ok(()) } else { fail(libc::ENXIO) }
}

/// The one attribute of the system: the XCR0 bits that guests can be offered.
fn system_attribute(attribute: &kvm_device_attr) -> Result<()> {
    let known = attribute.group == 0
        && attribute.attr == KVM_X86_XCOMP_GUEST_SUPP as u64
        && attribute.flags == 0;
    if known { Ok(()) } else { fail(libc::ENXIO) }
}

/// What an absent descriptor would hold.
fn word(address: u64) -> Result<u64> {
    read(address)
}

table! {
    System {
        0x00 KVM_GET_API_VERSION (none) [] "12." => |kvm, _| value(kvm.get_api_version());
        0x01 KVM_CREATE_VM (none) [] "A VM of type 0, the only one." => |kvm, kind| kvm.create_vm_with_type(kind).map(Answer::Vm);
        0x02 KVM_GET_MSR_INDEX_LIST (both kvm_msr_list) [] "The MSRs to save and restore." => |_, at| give_indices(at, &msrs::index_list());
        0x03 KVM_CHECK_EXTENSION (none) [] "The value of a capability, 0 for those not known." => |_, n| value(u32::try_from(n).map_or(0, capabilities::check));
        0x04 KVM_GET_VCPU_MMAP_SIZE (none) [] "Three pages: `kvm_run`, port data, the coalesced ring." => |_, _| value(RUN_SIZE as i64);
        0x05 KVM_GET_SUPPORTED_CPUID (both kvm_cpuid2) [KVM_CAP_EXT_CPUID] "The host's CPUID, cut down to what the processor implements." => |_, at| give_cpuid(at, &cpuid::supported());
        0x09 KVM_GET_EMULATED_CPUID (both kvm_cpuid2) [] "Nothing is emulated that is not supported." => |_, at| give_cpuid(at, &[]);
        0x0a KVM_GET_MSR_FEATURE_INDEX_LIST (both kvm_msr_list) [KVM_CAP_GET_MSR_FEATURES] "The MSRs that describe features." => |_, at| give_indices(at, &msrs::feature_list());
        0x88 KVM_GET_MSRS (both kvm_msrs) [KVM_CAP_GET_MSR_FEATURES] "Values of feature MSRs; how many were read." => |_, at| {
            let mut entries = take_msrs(at)?;
            let read = entries
                .iter_mut()
                .map_while(|entry| msrs::feature(entry.index).map(|value| entry.data = value))
                .count();
            write_array(at + HEADER, &entries)?;
            value(read as i64)
        };
        0x9d KVM_X86_GET_MCE_CAP_SUPPORTED (read u64) [KVM_CAP_MCE] "Machine-check capabilities: MCG_CTL and software recovery." => |_, at| give(at, Ok(msrs::MCE_SUPPORTED));
        0xe2 KVM_GET_DEVICE_ATTR (write kvm_device_attr) [KVM_CAP_SYS_ATTRIBUTES] "The extended-state components that can be offered." => |_, at| {
            let attribute = read(at)?;
            system_attribute(&attribute)?;
            give(attribute.addr, Ok(cpuid::supported_xcr0()))
        };
        0xe3 KVM_HAS_DEVICE_ATTR (write kvm_device_attr) [KVM_CAP_SYS_ATTRIBUTES] "Whether an attribute exists." => |_, at| take(at, |attribute| system_attribute(&attribute));
    }
    Vm {
        0x03 KVM_CHECK_EXTENSION (none) [KVM_CAP_CHECK_EXTENSION_VM] "The value of a capability." => |_, n| value(u32::try_from(n).map_or(0, capabilities::check));
        0x41 KVM_CREATE_VCPU (none) [] "A vCPU with this ID." => |vm, id| vm.create_vcpu(id).map(Answer::Vcpu);
        0x42 KVM_GET_DIRTY_LOG (write kvm_dirty_log) [] "The pages of a slot written since the last call; with manual protection it clears nothing." => get_dirty_log;
        0x44 KVM_SET_NR_MMU_PAGES (none) [KVM_CAP_MMU_SHADOW_CACHE_CONTROL] "The greatest number of pages for page tables; at least 64." => |vm, pages| vm.set_nr_mmu_pages(pages).and(DONE);
        0x45 KVM_GET_NR_MMU_PAGES (none) [KVM_CAP_MMU_SHADOW_CACHE_CONTROL] "That number, as far as an int holds it." => |vm, _| value(vm.get_nr_mmu_pages().min(i32::MAX as u64) as i64);
        0x46 KVM_SET_USER_MEMORY_REGION (write kvm_userspace_memory_region) [KVM_CAP_USER_MEMORY] "Creates, moves, changes or deletes a slot." => |vm, at| take(at, |region| vm.inner().set_memory_region(&region));
        0x47 KVM_SET_TSS_ADDR (none) [KVM_CAP_SET_TSS_ADDR] "Checked and recorded; nothing is kept there." => |vm, address| vm.inner().set_tss_address(address).and(DONE);
        0x48 KVM_SET_IDENTITY_MAP_ADDR (write u64) [KVM_CAP_SET_IDENTITY_MAP_ADDR] "Checked and recorded; nothing is kept there." => |vm, at| vm.inner().set_identity_map(word(at)?).and(DONE);
        0x49 KVM_SET_USER_MEMORY_REGION2 (write kvm_userspace_memory_region2) [KVM_CAP_USER_MEMORY2] "As the former; guest memory descriptors are refused." => memory_region2;
        0x60 KVM_CREATE_IRQCHIP (none) [KVM_CAP_IRQCHIP] "Two 8259s, an I/O APIC and local APICs." => |vm, _| vm.create_irq_chip().and(DONE);
        0x61 KVM_IRQ_LINE (write kvm_irq_level) [] "Drives a GSI." => |vm, at| irq_line(vm, at).and(DONE);
        0x62 KVM_GET_IRQCHIP (both kvm_irqchip) [KVM_CAP_IRQCHIP] "State of a controller." => |vm, at| {
            let mut chip = read(at)?;
            vm.get_irqchip(&mut chip)?;
            give(at, Ok(chip))
        };
        0x63 KVM_SET_IRQCHIP (read kvm_irqchip) [KVM_CAP_IRQCHIP] "Sets the state of a controller." => |vm, at| take(at, |chip| vm.set_irqchip(&chip));
        0x64 KVM_CREATE_PIT (none) [KVM_CAP_PIT] "A PIT with its speaker port." => |vm, _| {
            let flags = KVM_PIT_SPEAKER_DUMMY;
            vm.create_pit2(kvm_pit_config { flags, ..Default::default() }).and(DONE)
        };
        0x65 KVM_GET_PIT (both kvm_pit_state) [KVM_CAP_PIT] "Channels of the PIT." => |vm, at| {
            give(at, vm.get_pit2().map(|state| kvm_pit_state { channels: state.channels }))
        };
        0x66 KVM_SET_PIT (read kvm_pit_state) [KVM_CAP_PIT] "Sets the channels of the PIT." => |vm, at| take(at, |state: kvm_pit_state| {
            let channels = state.channels;
            vm.set_pit2(&kvm_pit_state2 { channels, ..Default::default() })
        });
        0x67 KVM_IRQ_LINE_STATUS (both kvm_irq_level) [KVM_CAP_IRQ_INJECT_STATUS] "Drives a GSI and says what became of it." => |vm, at| {
            let status = irq_line(vm, at)?;
            write(at, &(status as u32))?;
            DONE
        };
        0x67 KVM_REGISTER_COALESCED_MMIO (write kvm_coalesced_mmio_zone) [KVM_CAP_COALESCED_MMIO] "Writes to a zone go to the ring." => |vm, at| take(at, |zone| vm.inner().coalesced.register(&zone));
        0x68 KVM_UNREGISTER_COALESCED_MMIO (write kvm_coalesced_mmio_zone) [KVM_CAP_COALESCED_MMIO] "Removes the zones that the given one contains." => |vm, at| take(at, |zone| vm.inner().coalesced.unregister(&zone));
        0x6a KVM_SET_GSI_ROUTING (write kvm_irq_routing) [KVM_CAP_IRQ_ROUTING] "Replaces all routes." => set_gsi_routing;
        0x71 KVM_REINJECT_CONTROL (none) [KVM_CAP_REINJECT_CONTROL] "Whether missed PIT ticks are delivered later." => |vm, at| take(at, |control| vm.reinject_control(&control));
        0x76 KVM_IRQFD (write kvm_irqfd) [KVM_CAP_IRQFD] "Ties an eventfd to a GSI; with resampling for level-triggered ones." => |vm, at| take(at, |request| vm.inner().irqfd(&request));
        0x77 KVM_CREATE_PIT2 (write kvm_pit_config) [KVM_CAP_PIT2] "A PIT." => |vm, at| take(at, |config| vm.create_pit2(config));
        0x78 KVM_SET_BOOT_CPU_ID (none) [KVM_CAP_SET_BOOT_CPU_ID] "Which vCPU is the bootstrap processor." => |vm, id| {
            vm.set_boot_cpu_id(u32::try_from(id).map_err(|_| Error::new(libc::EINVAL))?).and(DONE)
        };
        0x79 KVM_IOEVENTFD (write kvm_ioeventfd) [KVM_CAP_IOEVENTFD] "A write to an address or port signals an eventfd." => |vm, at| take(at, |request| vm.inner().ioeventfds.apply(&request));
        0x7b KVM_SET_CLOCK (write kvm_clock_data) [KVM_CAP_ADJUST_CLOCK] "Sets the paravirtual clock." => |vm, at| take(at, |clock| vm.set_clock(&clock));
        0x7c KVM_GET_CLOCK (read kvm_clock_data) [KVM_CAP_ADJUST_CLOCK] "The paravirtual clock with real time and host counter." => |vm, at| give(at, vm.get_clock());
        0x9f KVM_GET_PIT2 (read kvm_pit_state2) [KVM_CAP_PIT_STATE2] "State of the PIT." => |vm, at| give(at, vm.get_pit2());
        0xa0 KVM_SET_PIT2 (write kvm_pit_state2) [KVM_CAP_PIT_STATE2] "Sets the state of the PIT." => |vm, at| take(at, |state| vm.set_pit2(&state));
        0xa2 KVM_SET_TSC_KHZ (none) [KVM_CAP_VM_TSC_CONTROL] "Frequency of the counters of vCPUs made later." => |vm, khz| vm.set_tsc_khz(khz as u32).and(DONE);
        0xa3 KVM_GET_TSC_KHZ (none) [KVM_CAP_VM_TSC_CONTROL] "Frequency of the counters of vCPUs made later." => |vm, _| value(vm.get_tsc_khz()?);
        0xa3 KVM_ENABLE_CAP (write kvm_enable_cap) [KVM_CAP_ENABLE_CAP_VM] "Enables a capability of the VM." => |vm, at| take(at, |request| vm.enable_cap(&request));
        0xa5 KVM_SIGNAL_MSI (write kvm_msi) [KVM_CAP_SIGNAL_MSI] "Sends a message-signalled interrupt; how many took it." => |vm, at| value(vm.signal_msi(read(at)?)?);
        0xc0 KVM_CLEAR_DIRTY_LOG (both kvm_clear_dirty_log) [KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2] "Clears and protects the pages that a bitmap names." => clear_dirty_log;
        0xc6 KVM_X86_SET_MSR_FILTER (write kvm_msr_filter) [KVM_CAP_X86_MSR_FILTER] "Which MSRs the guest may touch." => set_msr_filter;
        0xc7 KVM_RESET_DIRTY_RINGS (none) [KVM_CAP_DIRTY_LOG_RING] "Protects the pages that user space has collected from the rings." => |vm, _| value(vm.reset_dirty_rings()?);
        0xce KVM_GET_STATS_FD (none) [KVM_CAP_BINARY_STATS_FD] "A file of the MMU's counters." => |vm, _| vm.get_stats_fd().map(Answer::Descriptor);
        0xe0 KVM_CREATE_DEVICE (both kvm_create_device) [KVM_CAP_DEVICE_CTRL] "ENODEV: no kind of device exists that is made this way, as in a KVM without VFIO." => |_, at| take(at, |_: kvm_create_device| fail(libc::ENODEV));
        0xf0 EPTIDE_SET_ACCESS (write AccessBytes) [EPTIDE_CAP_EXECUTION_TRAPS] "Sets the access byte of each page of a range: 1 traps execution. In force before the next instruction of any vCPU." => set_access;
        0xf1 EPTIDE_GET_ACCESS (write AccessBytes) [EPTIDE_CAP_EXECUTION_TRAPS] "Reads the access bytes of a range." => get_access;
    }
    Vcpu {
        0x80 KVM_RUN (none) [] "Runs the guest until user space is needed." => |vcpu, argument| {
            if argument != 0 {
                return fail(libc::EINVAL);
            }
            vcpu.inner().run().and(DONE)
        };
        0x81 KVM_GET_REGS (read kvm_regs) [] "General-purpose registers." => |vcpu, at| give(at, vcpu.get_regs());
        0x82 KVM_SET_REGS (write kvm_regs) [] "Sets general-purpose registers; a pending exception is dropped." => |vcpu, at| take(at, |regs| vcpu.set_regs(&regs));
        0x83 KVM_GET_SREGS (read kvm_sregs) [] "Segments and control registers." => |vcpu, at| give(at, vcpu.get_sregs());
        0x84 KVM_SET_SREGS (write kvm_sregs) [] "Sets segments and control registers, if a processor could hold them." => |vcpu, at| take(at, |sregs| vcpu.set_sregs(&sregs));
        0x85 KVM_TRANSLATE (both kvm_translation) [] "Walks the guest's tables for an address." => |vcpu, at| {
            let request: kvm_translation = read(at)?;
            give(at, vcpu.translate_gva(request.linear_address))
        };
        0x86 KVM_INTERRUPT (write kvm_interrupt) [] "Injects an interrupt, for a local APIC or an 8259 in user space." => |vcpu, at| take(at, |interrupt: kvm_interrupt| vcpu.interrupt(interrupt.irq));
        0x88 KVM_GET_MSRS (both kvm_msrs) [] "Values of MSRs; how many were read." => |vcpu, at| {
            let mut entries = take_msrs(at)?;
            let read = vcpu.read_msrs(&mut entries)?;
            write_array(at + HEADER, &entries)?;
            value(read as i64)
        };
        0x89 KVM_SET_MSRS (write kvm_msrs) [] "Sets MSRs; how many were written." => |vcpu, at| value(vcpu.write_msrs(&take_msrs(at)?)? as i64);
        0x8a KVM_SET_CPUID (write kvm_cpuid) [] "The guest's CPUID, without sub-leaves." => take_cpuid_without_index;
        0x8b KVM_SET_SIGNAL_MASK (write kvm_signal_mask) [] "Signals that end KVM_RUN although the thread blocks them." => set_signal_mask;
        0x8c KVM_GET_FPU (read kvm_fpu) [] "x87 and SSE registers." => |vcpu, at| give(at, vcpu.get_fpu());
        0x8d KVM_SET_FPU (write kvm_fpu) [] "Sets x87 and SSE registers." => |vcpu, at| take(at, |fpu| vcpu.set_fpu(&fpu));
        0x8e KVM_GET_LAPIC (read kvm_lapic_state) [KVM_CAP_IRQCHIP] "Registers of the local APIC." => |vcpu, at| give(at, vcpu.get_lapic());
        0x8f KVM_SET_LAPIC (write kvm_lapic_state) [KVM_CAP_IRQCHIP] "Sets the registers of the local APIC." => |vcpu, at| take(at, |lapic| vcpu.set_lapic(&lapic));
        0x90 KVM_SET_CPUID2 (write kvm_cpuid2) [KVM_CAP_EXT_CPUID] "The guest's CPUID; refused if it changes after the guest has run." => take_cpuid;
        0x91 KVM_GET_CPUID2 (both kvm_cpuid2) [KVM_CAP_EXT_CPUID] "The guest's CPUID." => |vcpu, at| give_cpuid(at, &vcpu.cpuid_entries()?);
        0x92 KVM_TPR_ACCESS_REPORTING (both kvm_tpr_access_ctl) [KVM_CAP_VAPIC] "Whether accesses to the TPR of the xAPIC page end KVM_RUN." => |vcpu, at| take(at, |control: kvm_tpr_access_ctl| {
            if control.flags != 0 {
                return fail(libc::EINVAL);
            }
            vcpu.set_tpr_access_reporting(control.enabled != 0)
        });
        0x93 KVM_SET_VAPIC_ADDR (write kvm_vapic_addr) [KVM_CAP_VAPIC] "Where the TPR is kept in memory for the guest." => |vcpu, at| take(at, |address: kvm_vapic_addr| vcpu.set_vapic_address(address.vapic_addr));
        0x98 KVM_GET_MP_STATE (read kvm_mp_state) [KVM_CAP_MP_STATE] "Whether the vCPU runs, halts or waits." => |vcpu, at| give(at, vcpu.get_mp_state());
        0x99 KVM_SET_MP_STATE (write kvm_mp_state) [KVM_CAP_MP_STATE] "Sets whether the vCPU runs, halts or waits." => |vcpu, at| take(at, |state| vcpu.set_mp_state(state));
        0x9a KVM_NMI (none) [KVM_CAP_USER_NMI] "Sends an NMI." => |vcpu, _| vcpu.nmi().and(DONE);
        0x9b KVM_SET_GUEST_DEBUG (write kvm_guest_debug) [KVM_CAP_SET_GUEST_DEBUG] "Breakpoints, hardware breakpoints, single steps." => |vcpu, at| take(at, |request| vcpu.set_guest_debug(&request));
        0x9c KVM_X86_SETUP_MCE (write u64) [KVM_CAP_MCE] "Number and capabilities of machine-check banks." => |vcpu, at| vcpu.setup_mce(word(at)?).and(DONE);
        0x9e KVM_X86_SET_MCE (write kvm_x86_mce) [KVM_CAP_MCE] "Injects a machine check." => |vcpu, at| take(at, |mce| vcpu.set_mce(&mce));
        0x9f KVM_GET_VCPU_EVENTS (read kvm_vcpu_events) [KVM_CAP_VCPU_EVENTS] "Pending and injected events." => |vcpu, at| give(at, vcpu.get_vcpu_events());
        0xa0 KVM_SET_VCPU_EVENTS (write kvm_vcpu_events) [KVM_CAP_VCPU_EVENTS] "Sets pending and injected events." => |vcpu, at| take(at, |events| vcpu.set_vcpu_events(&events));
        0xa1 KVM_GET_DEBUGREGS (read kvm_debugregs) [KVM_CAP_DEBUGREGS] "Debug registers." => |vcpu, at| give(at, vcpu.get_debug_regs());
        0xa2 KVM_SET_DEBUGREGS (write kvm_debugregs) [KVM_CAP_DEBUGREGS] "Sets debug registers." => |vcpu, at| take(at, |registers| vcpu.set_debug_regs(&registers));
        0xa2 KVM_SET_TSC_KHZ (none) [KVM_CAP_TSC_CONTROL] "Frequency of the counter, by scaling." => |vcpu, khz| vcpu.set_tsc_khz(khz as u32).and(DONE);
        0xa3 KVM_GET_TSC_KHZ (none) [KVM_CAP_GET_TSC_KHZ] "Frequency of the counter." => |vcpu, _| value(vcpu.get_tsc_khz()?);
        0xa3 KVM_ENABLE_CAP (write kvm_enable_cap) [KVM_CAP_ENABLE_CAP] "Enables a capability of the vCPU: KVM_CAP_ENFORCE_PV_FEATURE_CPUID." => |vcpu, at| take(at, |request| vcpu.enable_cap(&request));
        0xa4 KVM_GET_XSAVE (read [u32; 1024]) [KVM_CAP_XSAVE] "Extended state in the standard format." => |vcpu, at| give(at, vcpu.get_xsave().map(|xsave| xsave.region));
        0xa5 KVM_SET_XSAVE (write [u32; 1024]) [KVM_CAP_XSAVE] "Sets extended state." => |vcpu, at| take(at, |region| vcpu.load_xsave(region));
        0xa6 KVM_GET_XCRS (read kvm_xcrs) [KVM_CAP_XCRS] "XCR0." => |vcpu, at| give(at, vcpu.get_xcrs());
        0xa7 KVM_SET_XCRS (write kvm_xcrs) [KVM_CAP_XCRS] "Sets XCR0." => |vcpu, at| take(at, |xcrs| vcpu.set_xcrs(&xcrs));
        0xad KVM_KVMCLOCK_CTRL (none) [KVM_CAP_KVMCLOCK_CTRL] "Tells the guest that it was stopped." => |vcpu, _| vcpu.kvmclock_ctrl().and(DONE);
        0xb7 KVM_SMI (none) [KVM_CAP_X86_SMM] "Sends an SMI." => |vcpu, _| vcpu.smi().and(DONE);
        0xcc KVM_GET_SREGS2 (read kvm_sregs2) [KVM_CAP_SREGS2] "As KVM_GET_SREGS, with the PDPTEs." => |vcpu, at| give(at, vcpu.get_sregs2());
        0xcd KVM_SET_SREGS2 (write kvm_sregs2) [KVM_CAP_SREGS2] "As KVM_SET_SREGS, with the PDPTEs." => |vcpu, at| take(at, |sregs| vcpu.set_sregs2(&sregs));
        0xce KVM_GET_STATS_FD (none) [KVM_CAP_BINARY_STATS_FD] "A file of the vCPU's counters." => |vcpu, _| vcpu.get_stats_fd().map(Answer::Descriptor);
        0xcf KVM_GET_XSAVE2 (read [u32; 1024]) [KVM_CAP_XSAVE2] "As KVM_GET_XSAVE: no offered component needs more room." => |vcpu, at| give(at, vcpu.get_xsave().map(|xsave| xsave.region));
        0xe1 KVM_SET_DEVICE_ATTR (write kvm_device_attr) [KVM_CAP_VCPU_ATTRIBUTES] "Sets the offset of the counter." => |vcpu, at| take(at, |attribute| {
            tsc_attribute(&attribute)?;
            vcpu.set_tsc_offset(read(attribute.addr)?)
        });
        0xe2 KVM_GET_DEVICE_ATTR (write kvm_device_attr) [KVM_CAP_VCPU_ATTRIBUTES] "The offset of the counter." => |vcpu, at| {
            let attribute = read(at)?;
            tsc_attribute(&attribute)?;
            give(attribute.addr, vcpu.tsc_offset())
        };
        0xe3 KVM_HAS_DEVICE_ATTR (write kvm_device_attr) [KVM_CAP_VCPU_ATTRIBUTES] "Whether an attribute exists." => |_, at| take(at, |attribute| tsc_attribute(&attribute));
    }
}
