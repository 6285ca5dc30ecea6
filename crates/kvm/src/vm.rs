//! A virtual machine: what its vCPUs share.

use crate::clock::VmClock;
use crate::coalesced::Coalesced;
use crate::error::{Error, Result, fail};
use crate::eventfd::{IoEventFds, IrqFds};
use crate::irqchip::apics::Apics;
use crate::irqchip::lapic::ApicConfig;
use crate::irqchip::message::Delivery;
use crate::irqchip::routing::{MAX_ROUTES, Route, Routing};
use crate::irqchip::{IrqChip, LineSource, Model};
use crate::mailbox::{Mailbox, Request};
use crate::run_area::SharedMemory;
use crate::time::{GuestTsc, tsc, tsc_khz};
use crate::timers::Timers;
use crate::vcpu::Vcpu;
use arc_swap::ArcSwap;
use arch::addr::{Gpa, Hva};
use kvm_bindings::*;
use mmu::{AddressSpace, DirtyMethod, MemoryRegion, Mmu, SlotError};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// The greatest number of vCPUs of a VM.
pub(crate) const MAX_VCPUS: usize = 1024;
/// One more than the highest vCPU ID.
pub(crate) const MAX_VCPU_ID: u32 = 1024;
/// One more than the highest slot number.
pub(crate) const MAX_SLOTS: u16 = 32764;

/// The greatest number of table pages of a VM without EPT: 128 MiB. Shadow tables grow with the
/// guest's, not with its memory.
const SHADOW_PAGES: usize = 1 << 15;

/// The mailboxes of a VM's vCPUs by ID: how the MMU reaches processors.
#[derive(Default)]
pub(crate) struct Processors {
    all: ArcSwap<Vec<(u32, Arc<Mailbox>)>>,
}

impl Processors {
    fn add(&self, id: u32, mailbox: Arc<Mailbox>) {
        self.all.rcu(|all| {
            let mut all = Vec::clone(all);
            all.push((id, mailbox.clone()));
            all
        });
    }

    /// Posts a request to every vCPU.
    pub(crate) fn post_all(&self, request: Request) {
        for (_, mailbox) in self.all.load().iter() {
            mailbox.post(request);
        }
    }

    /// The mailbox of one vCPU.
    pub(crate) fn mailbox(&self, id: u32) -> Option<Arc<Mailbox>> {
        let all = self.all.load();
        all.iter()
            .find(|(other, _)| *other == id)
            .map(|(_, mailbox)| mailbox.clone())
    }
}

impl mmu::Processors for Processors {
    fn kick(&self, vcpu: u32) {
        if let Some(mailbox) = self.mailbox(vcpu) {
            mailbox.kick();
        }
    }
}

/// What KVM_ENABLE_CAP and its kin set.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    pub(crate) boot_vcpu: u32,
    pub(crate) x2apic_wide: bool,
    /// The guest's reads of MSR_PLATFORM_INFO raise #GP (KVM_CAP_MSR_PLATFORM_INFO).
    pub(crate) hides_platform_info: bool,
    pub(crate) exception_payload: bool,
    pub(crate) triple_fault_event: bool,
    /// Hypercalls that exit to user space, by number.
    pub(crate) exit_hypercalls: u64,
    pub(crate) disabled_quirks: u64,
    /// KVM_X86_DISABLE_EXITS_HLT.
    pub(crate) halts_in_guest: bool,
    pub(crate) exit_on_emulation_failure: bool,
    /// KVM_MSR_EXIT_REASON_* that go to user space.
    pub(crate) user_space_msrs: u32,
    pub(crate) msr_filter: Option<Arc<crate::msr_filter::MsrFilter>>,
    pub(crate) manual_dirty_log: u64,
    /// Bytes of each vCPU's dirty ring, 0 without.
    pub(crate) dirty_ring: u32,
    /// IDs of vCPUs are below this, if it was set.
    pub(crate) max_vcpu_id: Option<u32>,
}

/// Where vCPUs' counters were last set together.
#[derive(Clone, Copy, Debug)]
struct TscSync {
    value: u64,
    host: u64,
    offset: u64,
    multiplier: u64,
}

/// A virtual machine.
pub(crate) struct Vm {
    pub(crate) mmu: Arc<Mmu>,
    pub(crate) machine: Arc<cpu::Machine>,
    pub(crate) processors: Arc<Processors>,
    pub(crate) timers: Timers,
    pub(crate) clock: VmClock,
    pub(crate) irqfds: IrqFds,
    pub(crate) ioeventfds: IoEventFds,
    pub(crate) coalesced: Coalesced,
    pub(crate) rings: Arc<crate::dirty_ring::Rings>,
    pub(crate) fd: SharedMemory,
    stats: OnceLock<crate::stats::StatsFile>,
    apics: Arc<Apics>,
    irqchip: OnceLock<Arc<IrqChip>>,
    settings: ArcSwap<Settings>,
    /// Creation of vCPUs and controllers, one at a time.
    creation: Mutex<Vec<u32>>,
    bugged: AtomicBool,
    tsc_sync: Mutex<TscSync>,
    default_tsc_khz: AtomicU64,
    tss_address: AtomicU64,
    /// What KVM_SET_NR_MMU_PAGES said.
    max_mmu_pages: AtomicU64,
    identity_map: AtomicU64,
    /// [`crate::Options::strict_cpuid`].
    pub(crate) has_strict_cpuid: bool,
    /// [`crate::Options::engine`].
    pub(crate) engine: cpu::Engine,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").finish_non_exhaustive()
    }
}

impl Vm {
    /// KVM_CREATE_VM.
    pub(crate) fn new(options: crate::Options) -> Result<Arc<Vm>> {
        let processors = Arc::new(Processors::default());
        let config = mmu::Config {
            physical_bits: crate::cpuid::max_physical_bits() as u32,
            shadow: !options.ept,
            dirty_method: if options.ept && options.pml {
                DirtyMethod::PageModificationLog
            } else {
                DirtyMethod::WriteProtect
            },
            max_table_pages: if options.ept {
                usize::MAX
            } else {
                SHADOW_PAGES
            },
            ..mmu::Config::default()
        };
        let host = Box::new(crate::host_memory::HostMemory::default());
        let mmu = Mmu::with_host(config, processors.clone(), host).map_err(|error| {
            tracing::error!(%error, "no MMU for this host");
            Error::new(libc::EINVAL)
        })?;
        let host = tsc();
        Ok(Arc::new(Vm {
            mmu,
            machine: cpu::Machine::new(),
            processors,
            timers: Timers::new(),
            clock: VmClock::default(),
            irqfds: IrqFds::default(),
            ioeventfds: IoEventFds::default(),
            coalesced: Coalesced::new()?,
            rings: Arc::default(),
            fd: SharedMemory::new("kvm-vm", crate::run_area::PAGE, crate::run_area::PAGE)?,
            stats: OnceLock::new(),
            apics: Arc::default(),
            irqchip: OnceLock::new(),
            settings: ArcSwap::default(),
            creation: Mutex::default(),
            bugged: AtomicBool::new(false),
            tsc_sync: Mutex::new(TscSync {
                value: 0,
                host,
                offset: 0u64.wrapping_sub(host),
                multiplier: 1 << 48,
            }),
            default_tsc_khz: AtomicU64::new(tsc_khz()),
            tss_address: AtomicU64::new(0),
            max_mmu_pages: AtomicU64::new(config.max_table_pages as u64),
            identity_map: AtomicU64::new(0xfffb_c000),
            has_strict_cpuid: options.strict_cpuid,
            engine: options.engine,
        }))
    }

    /// Processors log the pages that they make dirty.
    pub(crate) fn logs_pages(&self) -> bool {
        self.mmu.config().dirty_method == DirtyMethod::PageModificationLog
    }

    /// EIO once an inconsistency was found.
    pub(crate) fn check_alive(&self) -> Result<()> {
        if self.bugged.load(Ordering::Relaxed) {
            fail(libc::EIO)
        } else {
            Ok(())
        }
    }

    /// Marks the VM as inconsistent: every later call fails with EIO and its vCPUs stop.
    pub(crate) fn bug(&self, facts: &str) {
        if !self.bugged.swap(true, Ordering::SeqCst) {
            tracing::error!(facts, "inconsistent state: the VM is dead");
            self.processors.post_all(Request::VM_DEAD);
        }
    }

    /// The settings in force.
    pub(crate) fn settings(&self) -> arc_swap::Guard<Arc<Settings>> {
        self.settings.load()
    }

    /// Changes settings.
    pub(crate) fn update_settings(&self, change: impl Fn(&mut Settings)) {
        self.settings.rcu(|settings| {
            let mut settings = Settings::clone(settings);
            change(&mut settings);
            settings
        });
    }

    fn creation(&self) -> MutexGuard<'_, Vec<u32>> {
        self.creation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether CPUID shows MWAIT as IA32_MISC_ENABLE has it, rather than as user space gave it.
    pub(crate) fn cpuid_follows_misc_enable(&self) -> bool {
        !self.has_quirk(KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT)
    }

    /// Whether a vCPU exists.
    pub(crate) fn has_vcpus(&self) -> bool {
        !self.creation().is_empty()
    }

    /// KVM_CREATE_VCPU.
    pub(crate) fn create_vcpu(self: &Arc<Self>, id: u64) -> Result<Arc<Vcpu>> {
        self.check_alive()?;
        let mut created = self.creation();
        let limit = self.settings().max_vcpu_id.unwrap_or(MAX_VCPU_ID) as u64;
        if id >= limit {
            return fail(libc::EINVAL);
        }
        let id = id as u32;
        if created.contains(&id) {
            return fail(libc::EEXIST);
        }
        if created.len() >= MAX_VCPUS {
            return fail(libc::EINVAL);
        }
        self.limit_mmu_pages(created.len() + 1);
        let vcpu = Vcpu::new(self, id)?;
        self.processors.add(id, vcpu.shared_mailbox());
        if let Some(apic) = vcpu.apic() {
            self.apics.add(apic.clone());
        }
        if let Some(ring) = vcpu.dirty_ring() {
            self.rings.add(ring.clone());
        }
        created.push(id);
        Ok(vcpu)
    }

    /// Whether `id` is the bootstrap processor.
    pub(crate) fn is_bootstrap(&self, id: u32) -> bool {
        self.settings().boot_vcpu == id
    }

    /// KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK.
    pub(crate) fn disable_broadcast_quirk(&self) {
        self.apics.disable_broadcast_quirk();
    }

    /// Whether a quirk of KVM's (KVM_X86_QUIRK_*) is not disabled.
    pub(crate) fn has_quirk(&self, quirk: u32) -> bool {
        self.settings().disabled_quirks & quirk as u64 == 0
    }

    /// The configuration of new local APICs, if they are in this process.
    pub(crate) fn apic_config(&self) -> Option<ApicConfig> {
        let chip = self.irqchip.get()?;
        let settings = self.settings();
        Some(ApicConfig {
            wide_ids: settings.x2apic_wide,
            directed_eoi: matches!(chip.model(), Model::Split { .. }),
            lint0_enabled: self.has_quirk(KVM_X86_QUIRK_LINT0_REENABLED),
        })
    }

    /// The interrupt controllers, if they are in this process.
    pub(crate) fn irqchip(&self) -> Option<&Arc<IrqChip>> {
        self.irqchip.get()
    }

    /// The interrupt controllers if 8259s and I/O APIC are in this process.
    pub(crate) fn full_irqchip(&self) -> Result<&Arc<IrqChip>> {
        match self.irqchip.get() {
            Some(chip) if chip.model() == Model::Full => Ok(chip),
            _ => fail(libc::ENXIO),
        }
    }

    /// Whether the 8259s, if there are any, are user space's, which speaks for them with
    /// KVM_INTERRUPT.
    pub(crate) fn has_user_pic(&self) -> bool {
        self.irqchip()
            .is_none_or(|chip| chip.model() != Model::Full)
    }

    /// KVM_CREATE_IRQCHIP.
    pub(crate) fn create_irqchip(&self) -> Result<()> {
        self.install_irqchip(Model::Full)
    }

    /// KVM_CAP_SPLIT_IRQCHIP.
    pub(crate) fn split_irqchip(&self, pins: u64) -> Result<()> {
        if pins > MAX_ROUTES as u64 {
            return fail(libc::EINVAL);
        }
        self.install_irqchip(Model::Split {
            reserved_pins: pins as u32,
        })
    }

    fn install_irqchip(&self, model: Model) -> Result<()> {
        self.check_alive()?;
        let created = self.creation();
        if self.irqchip.get().is_some() {
            return fail(libc::EEXIST);
        }
        if !created.is_empty() {
            return fail(libc::EINVAL);
        }
        let chip = IrqChip::new(model, self.apics.clone());
        if self.settings().x2apic_wide {
            chip.set_wide();
        }
        self.irqchip.set(chip).map_err(|_| Error::new(libc::EEXIST))
    }

    /// KVM_CREATE_PIT2.
    pub(crate) fn create_pit(&self, config: &kvm_pit_config) -> Result<()> {
        let chip = match self.full_irqchip() {
            Ok(chip) => chip,
            Err(_) => return fail(libc::ENOENT),
        };
        if config.flags & !KVM_PIT_SPEAKER_DUMMY != 0 {
            return fail(libc::EINVAL);
        }
        chip.create_pit(&self.timers, config.flags & KVM_PIT_SPEAKER_DUMMY != 0)
    }

    /// KVM_SET_GSI_ROUTING.
    pub(crate) fn set_routing(&self, flags: u32, entries: &[kvm_irq_routing_entry]) -> Result<()> {
        let Some(chip) = self.irqchip.get() else {
            return fail(libc::EINVAL);
        };
        if flags != 0 || entries.len() > MAX_ROUTES {
            return fail(libc::EINVAL);
        }
        let routing = Routing::from_entries(entries, chip.model() == Model::Full)?;
        let valid = |route: &Route| match *route {
            Route::Msi { address, .. } => chip.is_msi_address(address),
            _ => true,
        };
        if !routing.all().all(valid) {
            return fail(libc::EINVAL);
        }
        chip.set_routing(routing);
        Ok(())
    }

    /// KVM_IRQ_LINE and KVM_IRQ_LINE_STATUS.
    pub(crate) fn set_irq_line(&self, gsi: u32, high: bool) -> Result<i32> {
        let Some(chip) = self.irqchip.get() else {
            return fail(libc::ENXIO);
        };
        if gsi as usize >= MAX_ROUTES {
            return Ok(Delivery::Ignored.status());
        }
        Ok(chip.set_line(gsi, LineSource::UserSpace, high).status())
    }

    /// KVM_SIGNAL_MSI: how many processors took it.
    pub(crate) fn signal_msi(&self, msi: &kvm_msi) -> Result<i32> {
        let Some(chip) = self.irqchip.get() else {
            return fail(libc::EINVAL);
        };
        if msi.flags & !KVM_MSI_VALID_DEVID != 0 {
            return fail(libc::EINVAL);
        }
        let address = msi.address_lo as u64 | (msi.address_hi as u64) << 32;
        if !chip.is_msi_address(address) {
            return fail(libc::EINVAL);
        }
        match chip.send_msi(address, msi.data) {
            Delivery::Ignored if !chip.has_destination(address, msi.data) => fail(libc::EPERM),
            delivery => Ok(delivery.status().max(0)),
        }
    }

    /// KVM_IRQFD.
    pub(crate) fn irqfd(&self, request: &kvm_irqfd) -> Result<()> {
        let Some(chip) = self.irqchip.get() else {
            return fail(libc::EINVAL);
        };
        if request.flags & KVM_IRQFD_FLAG_RESAMPLE != 0 && chip.model() != Model::Full {
            return fail(libc::EINVAL);
        }
        self.irqfds.apply(request, chip)
    }

    /// KVM_SET_USER_MEMORY_REGION.
    pub(crate) fn set_memory_region(&self, region: &kvm_userspace_memory_region) -> Result<()> {
        self.check_alive()?;
        let (space, number) = slot_number(region.slot)?;
        let end = region.userspace_addr.saturating_add(region.memory_size);
        if region.memory_size != 0 && reserved::is_own(region.userspace_addr..end) {
            return fail(libc::EINVAL);
        }
        let request = MemoryRegion {
            space,
            number,
            flags: region.flags,
            base: Gpa::new(region.guest_phys_addr),
            size: region.memory_size,
            hva: Hva::new(region.userspace_addr),
        };
        self.mmu.set_memory_region(&request).map_err(|error| {
            tracing::debug!(%error, "memory region refused");
            Error::new(match error {
                SlotError::Overlap(_) => libc::EEXIST,
                _ => libc::EINVAL,
            })
        })
    }

    /// KVM_CAP_DIRTY_LOG_RING: every vCPU created from now on has a ring of `bytes` bytes.
    pub(crate) fn enable_dirty_rings(&self, bytes: u64) -> Result<()> {
        let bytes = crate::dirty_ring::check_size(bytes, self.logs_pages())?;
        if self.settings().dirty_ring != 0 || self.has_vcpus() {
            return fail(libc::EINVAL);
        }
        self.update_settings(|settings| settings.dirty_ring = bytes);
        self.mmu.set_dirty_sink(self.rings.clone());
        Ok(())
    }

    /// KVM_RESET_DIRTY_RINGS: protects the pages that user space has collected; how many.
    pub(crate) fn reset_dirty_rings(&self) -> Result<i32> {
        if self.settings().dirty_ring == 0 {
            return fail(libc::EINVAL);
        }
        let mut count = 0;
        for ring in self.rings.all() {
            for (slot, offset) in ring.take_collected() {
                count += 1;
                // What user space left in the entry is not trusted: a slot or page that is gone
                // is ignored.
                if let Ok((space, number)) = slot_number(slot)
                    && offset < 1 << 40
                {
                    let page = offset & !63;
                    let _ = self
                        .mmu
                        .protect_pages(space, number, page, 1 << (offset & 63));
                }
            }
        }
        Ok(count)
    }

    /// KVM_SET_NR_MMU_PAGES.
    pub(crate) fn set_max_mmu_pages(&self, pages: u64) -> Result<()> {
        const MIN_PAGES: u64 = 64;
        if pages < MIN_PAGES {
            return fail(libc::EINVAL);
        }
        let created = self.creation();
        self.max_mmu_pages.store(pages, Ordering::Relaxed);
        self.limit_mmu_pages(created.len());
        Ok(())
    }

    /// KVM_GET_NR_MMU_PAGES.
    pub(crate) fn max_mmu_pages(&self) -> u64 {
        self.max_mmu_pages.load(Ordering::Relaxed)
    }

    /// What vCPUs set aside does not count.
    fn limit_mmu_pages(&self, vcpus: usize) {
        let set_aside = vcpus * mmu::CACHE_TABLES;
        let pages = (self.max_mmu_pages() as usize).saturating_add(set_aside);
        self.mmu.set_max_table_pages(pages);
    }

    /// KVM_SET_TSS_ADDR: recorded; this processor needs no TSS of its own for real mode.
    pub(crate) fn set_tss_address(&self, address: u64) -> Result<()> {
        const SEGMENT: u64 = 3 * 4096;
        if address > (1 << 32) - SEGMENT {
            return fail(libc::EINVAL);
        }
        self.tss_address.store(address, Ordering::Relaxed);
        Ok(())
    }

    /// KVM_SET_IDENTITY_MAP_ADDR: recorded; unpaged code needs no identity map here.
    pub(crate) fn set_identity_map(&self, address: u64) -> Result<()> {
        if self.has_vcpus() {
            return fail(libc::EINVAL);
        }
        let address = if address == 0 { 0xfffb_c000 } else { address };
        self.identity_map.store(address, Ordering::Relaxed);
        Ok(())
    }

    /// Frequency of new vCPUs' counters.
    pub(crate) fn default_tsc_khz(&self) -> u64 {
        self.default_tsc_khz.load(Ordering::Relaxed)
    }

    /// KVM_SET_TSC_KHZ on the VM; 0 is the host's frequency.
    pub(crate) fn set_default_tsc_khz(&self, khz: u64) {
        let khz = if khz == 0 { tsc_khz() } else { khz };
        self.default_tsc_khz.store(khz, Ordering::Relaxed);
    }

    /// The counter of a new vCPU: the VM's time since creation.
    pub(crate) fn initial_tsc(&self) -> GuestTsc {
        let sync = *self.tsc_sync.lock().unwrap_or_else(PoisonError::into_inner);
        let scaled = crate::tsc_scaling::scaled(self.default_tsc_khz());
        if scaled.multiplier == sync.multiplier {
            return GuestTsc {
                offset: sync.offset,
                ..scaled
            };
        }
        GuestTsc {
            offset: scaled.offset_for(sync.value, sync.host),
            ..scaled
        }
    }

    /// The offset for a counter that user space sets to `value`.
    ///
    /// A VMM that restores several vCPUs writes nearly equal values one after the other and means
    /// them to be the same: a write within a second of where the counter already would be joins
    /// the previous one. So does a write of 0, by which vCPUs are initialised.
    pub(crate) fn synchronized_tsc_offset(&self, guest: &GuestTsc, value: u64, host: u64) -> u64 {
        let mut sync = self.tsc_sync.lock().unwrap_or_else(PoisonError::into_inner);
        let joined = GuestTsc {
            offset: sync.offset,
            ..*guest
        };
        let distance = joined.at(host).abs_diff(value);
        let joins = value == 0 || distance < guest.khz * 1000;
        if joins && guest.multiplier == sync.multiplier {
            return sync.offset;
        }
        let offset = guest.offset_for(value, host);
        *sync = TscSync {
            value,
            host,
            offset,
            multiplier: guest.multiplier,
        };
        offset
    }

    /// KVM_GET_STATS_FD.
    pub(crate) fn stats_descriptor(&self) -> Result<std::os::fd::OwnedFd> {
        if self.stats.get().is_none() {
            let counters = self.mmu.stats();
            let names: Vec<_> = counters.iter().map(|(name, _)| name).collect();
            let id = format!("kvm-{}", std::process::id());
            // Whoever was first made the same file.
            let _ = self.stats.set(crate::stats::StatsFile::new(&id, &names)?);
        }
        self.update_stats();
        let stats = self.stats.get().ok_or(Error::new(libc::ENOMEM))?;
        stats.descriptor()
    }

    /// Brings the statistics file up to date, if there is one.
    pub(crate) fn update_stats(&self) {
        if let Some(stats) = self.stats.get() {
            let counters = self.mmu.stats();
            stats.update(counters.iter().map(|(_, value)| value));
        }
    }

    /// KVM_GET_CLOCK.
    pub(crate) fn clock_data(&self) -> kvm_clock_data {
        let host_tsc = tsc();
        kvm_clock_data {
            clock: self.clock.at(host_tsc),
            flags: KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC,
            realtime: crate::time::realtime_ns(),
            host_tsc,
            ..Default::default()
        }
    }

    /// KVM_SET_CLOCK.
    pub(crate) fn set_clock(&self, data: &kvm_clock_data) -> Result<()> {
        // What KVM_GET_CLOCK answers can be given back.
        let known = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
        if data.flags & !known != 0 {
            return fail(libc::EINVAL);
        }
        let mut clock = data.clock;
        if data.flags & KVM_CLOCK_REALTIME != 0 {
            // Time went on while the VM was away.
            let away = crate::time::realtime_ns().saturating_sub(data.realtime);
            clock = clock.wrapping_add(away);
        }
        self.clock.set(clock);
        self.processors.post_all(Request::CLOCK_UPDATE);
        Ok(())
    }
}

/// Splits a slot number of the API into address space and number.
pub(crate) fn slot_number(slot: u32) -> Result<(AddressSpace, u16)> {
    let space = match slot >> 16 {
        0 => AddressSpace::Normal,
        1 => AddressSpace::Smm,
        _ => return fail(libc::EINVAL),
    };
    let number = slot as u16;
    if number >= MAX_SLOTS {
        return fail(libc::EINVAL);
    }
    Ok((space, number))
}
