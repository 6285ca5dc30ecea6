//! Guest memory as instructions see it: linear addresses in, host accesses out.
//!
//! The fast path is a TLB hit: one compare, one add, one host instruction. Everything else takes
//! [`Vcpu::resolve`]: a walk of the guest's tables, each of whose reads goes through EPT, then
//! the translation of the final guest-physical address, then a TLB fill.
//!
//! ```text
//!   linear address ──TLB hit──▶ host access
//!        │ miss, page-crossing, watched, …
//!        ▼
//!   guest tables ──(each entry through EPT)──▶ guest-physical ──EPT──▶ host virtual
//!        │ forbidden                              │ violation, misconfiguration
//!        ▼                                        ▼
//!       #PF                              VM exit, or the bus while emulating
//! ```

use crate::host::{self, HostFault, HostInt};
use crate::op::Stop;
use crate::second_stage::{Outcome, Reason};
use crate::tlb::{Class, Fill};
use crate::vcpu::{Bus, BusResponse, Cause, Vcpu};
use crate::walk_cache::CachedTables;
use arch::addr::Gva;
use arch::apic::AccessType;
use arch::control_registers::{Cr0, Cr4, Rflags};
use arch::exception::Exception;
use arch::exit::{EptViolation, ExitReason, VmExit};
use arch::paging::{Access, GuestError, Privilege, Rights};

/// Segment index meaning "not the stack", for faults that depend on the segment.
pub(crate) const DATA: u8 = 3;
/// Segment index of the stack.
pub(crate) const STACK: u8 = 2;

pub(crate) const PAGE_MASK: u64 = !0xfff;

/// Where a resolved access goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// Host memory at this address.
    Ram { hva: u64 },
    /// The bus, at this guest-physical address.
    Bus { gpa: u64 },
    /// The APIC-access page, at this offset.
    Apic { offset: u32 },
}

/// Integer operations that the interpreter needs on every operand size.
pub(crate) trait Int: HostInt + Into<u64> + PartialEq {
    /// Bits.
    const BITS: u32;
    /// The low bits of `value`.
    fn truncate(value: u64) -> Self;
    /// Sign-extended to 64 bits.
    fn sign_extend(self) -> u64;
    /// The value whose bytes come first; loaded as wide as they were stored.
    fn from_first(bytes: [u8; 8]) -> Self;
}

macro_rules! int {
    ($($ty:ident $signed:ident)*) => {$(
        impl Int for $ty {
            const BITS: u32 = $ty::BITS;
            #[inline(always)]
            fn truncate(value: u64) -> $ty {
                value as $ty
            }
            #[inline(always)]
            fn sign_extend(self) -> u64 {
                self as $signed as i64 as u64
            }
            #[inline(always)]
            fn from_first(bytes: [u8; 8]) -> $ty {
                bytes.first_chunk().map_or(0, |first| $ty::from_le_bytes(*first))
            }
        }
    )*};
}

int!(u8 i8 u16 i16 u32 i32 u64 i64);

impl Vcpu {
    /// Reads `T` at the linear address `gva`.
    #[inline(always)]
    pub(crate) fn read<T: Int>(&mut self, gva: u64, segment: u8) -> Result<T, Stop> {
        let entry = self.tlb.entry(gva);
        let last = gva.wrapping_add(T::SIZE as u64 - 1);
        if entry.read == last & PAGE_MASK | self.context {
            // SAFETY: the address comes from a TLB entry, which came from the tables of the
            // second stage, which map nothing but memory given to the guest.
            if let Ok(value) = unsafe { T::load(gva.wrapping_add(entry.addend)) } {
                return Ok(value);
            }
        }
        self.read_slow(gva, segment)
    }

    /// Writes `value` at the linear address `gva`.
    #[inline(always)]
    pub(crate) fn write<T: Int>(&mut self, gva: u64, segment: u8, value: T) -> Result<(), Stop> {
        let entry = self.tlb.entry(gva);
        let last = gva.wrapping_add(T::SIZE as u64 - 1);
        if entry.write == last & PAGE_MASK | self.context {
            // SAFETY: as in `read`.
            if unsafe { T::store(gva.wrapping_add(entry.addend), value) }.is_ok() {
                return Ok(());
            }
        }
        self.write_slow(gva, segment, value)
    }

    #[cold]
    #[inline(never)]
    fn read_slow<T: Int>(&mut self, gva: u64, segment: u8) -> Result<T, Stop> {
        let mut bytes = [0; 8];
        self.read_bytes(gva, segment, &mut bytes[..T::SIZE])?;
        Ok(T::from_first(bytes))
    }

    #[cold]
    #[inline(never)]
    fn write_slow<T: Int>(&mut self, gva: u64, segment: u8, value: T) -> Result<(), Stop> {
        let value: u64 = value.into();
        self.write_bytes(gva, segment, &value.to_le_bytes()[..T::SIZE])
    }

    /// Reads up to 4096 bytes; every page is checked before any byte is read.
    pub(crate) fn read_bytes(
        &mut self,
        gva: u64,
        segment: u8,
        bytes: &mut [u8],
    ) -> Result<(), Stop> {
        self.check_address(gva, bytes.len(), segment)?;
        let access = self.data_access(Access::empty());
        if bytes.is_empty() || crosses(gva, bytes.len()) {
            let places = self.resolve_split(gva, bytes.len(), access)?;
            return self.transfer_in(gva, &places, bytes, access);
        }
        match self.resolve_cached(gva, access) {
            Ok(place) => self.transfer_part_in(gva, place, bytes, access),
            Err(Stop) => {
                self.note_interrupted_read(bytes.len());
                Err(Stop)
            }
        }
    }

    /// A read stopped: if a device is why, its emulation begins with that read.
    fn note_interrupted_read(&mut self, len: usize) {
        let is_device = matches!(
            &self.cause,
            Cause::Exit(exit) if exit.reason == ExitReason::EptMisconfiguration
        );
        self.interrupted_read = (is_device && self.failed_on_access).then_some(len);
    }

    /// Like [`Vcpu::read_bytes`], with a fast path for what lies in one page that the TLB knows.
    #[inline]
    pub(crate) fn read_wide(
        &mut self,
        gva: u64,
        segment: u8,
        bytes: &mut [u8],
    ) -> Result<(), Stop> {
        let entry = self.tlb.entry(gva);
        let last = gva.wrapping_add(bytes.len() as u64 - 1);
        if entry.read == last & PAGE_MASK | self.context {
            let hva = gva.wrapping_add(entry.addend);
            // SAFETY: as in `read`.
            if unsafe { load_part(hva, bytes) }.is_ok() {
                return Ok(());
            }
        }
        self.read_bytes(gva, segment, bytes)
    }

    /// Writes up to 4096 bytes; every page is checked before any byte is written.
    pub(crate) fn write_bytes(&mut self, gva: u64, segment: u8, bytes: &[u8]) -> Result<(), Stop> {
        self.check_address(gva, bytes.len(), segment)?;
        let places = self.resolve_split(gva, bytes.len(), self.data_access(Access::WRITE))?;
        self.transfer_out(gva, &places, bytes)
    }

    /// Checks that `len` bytes at `gva` can be written, as a prelude to writing them in parts.
    pub(crate) fn check_write(&mut self, gva: u64, len: usize, segment: u8) -> Result<(), Stop> {
        self.check_address(gva, len, segment)?;
        self.resolve_split(gva, len, self.data_access(Access::WRITE))
            .map(|_| ())
    }

    /// Checks that `len` bytes at `gva` can be read.
    pub(crate) fn check_read(&mut self, gva: u64, len: usize, segment: u8) -> Result<(), Stop> {
        self.check_address(gva, len, segment)?;
        self.resolve_split(gva, len, self.data_access(Access::empty()))
            .map(|_| ())
    }

    /// An implicit supervisor read of a system structure (descriptor table, TSS).
    pub(crate) fn read_system<T: Int>(&mut self, gva: u64) -> Result<T, Stop> {
        let mut bytes = [0; 8];
        let access = Access::IMPLICIT;
        self.check_canonical(gva, T::SIZE, DATA)?;
        let places = self.resolve_split(gva, T::SIZE, access)?;
        self.transfer_in(gva, &places, &mut bytes[..T::SIZE], access)?;
        Ok(T::from_first(bytes))
    }

    /// An implicit supervisor write of a system structure.
    pub(crate) fn write_system<T: Int>(&mut self, gva: u64, value: T) -> Result<(), Stop> {
        let value: u64 = value.into();
        self.check_canonical(gva, T::SIZE, DATA)?;
        let places = self.resolve_split(gva, T::SIZE, Access::IMPLICIT | Access::WRITE)?;
        self.transfer_out(gva, &places, &value.to_le_bytes()[..T::SIZE])
    }

    /// Writes to a stack that is not the current one yet, with the privilege of its segment.
    pub(crate) fn write_stack_as<T: Int>(
        &mut self,
        gva: u64,
        user: bool,
        value: T,
    ) -> Result<(), Stop> {
        let access = if user { Access::USER } else { Access::empty() };
        let value: u64 = value.into();
        self.check_canonical(gva, T::SIZE, STACK)?;
        let places = self.resolve_split(gva, T::SIZE, access | Access::WRITE)?;
        self.transfer_out(gva, &places, &value.to_le_bytes()[..T::SIZE])
    }

    /// Reads code bytes at `gva` into `bytes`, up to the end of its page; the number read.
    pub(crate) fn fetch_bytes(&mut self, gva: u64, bytes: &mut [u8]) -> Result<usize, Stop> {
        let hva = self.fetch_address(gva)?;
        let len = bytes.len().min(0x1000 - (gva & 0xfff) as usize);
        // SAFETY: `fetch_address` returns addresses of guest memory only.
        match unsafe { host::copy_from(hva, &mut bytes[..len]) } {
            Ok(()) => Ok(len),
            Err(HostFault) => {
                let access = self.fetch_access();
                Err(self.host_fault(gva, access))
            }
        }
    }

    /// The host address of the code byte at `gva`.
    pub(crate) fn fetch_address(&mut self, gva: u64) -> Result<u64, Stop> {
        let entry = self.tlb.entry(gva);
        if entry.fetch == gva & PAGE_MASK | self.fetch_context {
            return Ok(gva.wrapping_add(entry.addend));
        }
        match self.resolve(gva, self.fetch_access())? {
            Place::Ram { hva } => {
                self.code.page_mapped(hva & PAGE_MASK);
                Ok(hva)
            }
            Place::Bus { .. } => Err(self.stop_with(Cause::Unhandled)),
            Place::Apic { offset } => Err(self.apic_access_exit(AccessType::Fetch, offset)),
        }
    }

    /// The access bits of a data access by the current code.
    #[inline]
    pub(crate) fn data_access(&self, access: Access) -> Access {
        if self.user {
            access | Access::USER
        } else {
            access
        }
    }

    fn fetch_access(&self) -> Access {
        if self.user {
            Access::FETCH | Access::USER
        } else {
            Access::FETCH
        }
    }

    /// Canonical and alignment checks of a data access.
    pub(crate) fn check_address(&mut self, gva: u64, len: usize, segment: u8) -> Result<(), Stop> {
        self.check_canonical(gva, len, segment)?;
        if self.user
            && self.state.cr0.contains(Cr0::AM)
            && self.state.rflags_rest & Rflags::AC.bits() != 0
            && len.is_power_of_two()
            && len <= 8
            && gva & (len as u64 - 1) != 0
        {
            return Err(self.raise_code(Exception::AlignmentCheck, 0));
        }
        Ok(())
    }

    fn check_canonical(&mut self, gva: u64, len: usize, segment: u8) -> Result<(), Stop> {
        if !self.long_mode {
            return Ok(());
        }
        if self.is_canonical(gva) && self.is_canonical(gva.wrapping_add(len as u64).wrapping_sub(1))
        {
            return Ok(());
        }
        let fault = if segment == STACK {
            Exception::StackFault
        } else {
            Exception::GeneralProtection
        };
        Err(self.raise_code(fault, 0))
    }

    /// Whether `gva` is canonical under the current number of levels.
    #[inline]
    pub(crate) fn is_canonical(&self, gva: u64) -> bool {
        let unused = if self.state.cr4.contains(Cr4::LA57) {
            7
        } else {
            16
        };
        (gva << unused) as i64 >> unused == gva as i64
    }

    /// Resolves an access that may touch two pages. The second place is meaningful only then.
    pub(crate) fn resolve_split(
        &mut self,
        gva: u64,
        len: usize,
        access: Access,
    ) -> Result<[Place; 2], Stop> {
        let first = self.resolve_cached(gva, access)?;
        if len == 0 || !crosses(gva, len) {
            return Ok([first, first]);
        }
        let next = (gva & PAGE_MASK).wrapping_add(0x1000);
        let next = if self.long_mode {
            next
        } else {
            next & 0xffff_ffff
        };
        let second = self.resolve_cached(next, access)?;
        // No register crosses pages, so that such an access is not virtualized.
        for place in [first, second] {
            if let Place::Apic { offset } = place {
                let kind = if access.contains(Access::WRITE) {
                    AccessType::Write
                } else {
                    AccessType::Read
                };
                return Err(self.apic_access_exit(kind, offset));
            }
        }
        Ok([first, second])
    }

    pub(crate) fn transfer_in(
        &mut self,
        gva: u64,
        places: &[Place; 2],
        bytes: &mut [u8],
        access: Access,
    ) -> Result<(), Stop> {
        let split = bytes.len().min(0x1000 - (gva & 0xfff) as usize);
        let (head, tail) = bytes.split_at_mut(split);
        for (place, part, gva) in [
            (places[0], head, gva),
            (places[1], tail, gva.wrapping_add(split as u64)),
        ] {
            if !part.is_empty() {
                self.transfer_part_in(gva, place, part, access)?;
            }
        }
        Ok(())
    }

    /// Reads what lies in one page.
    fn transfer_part_in(
        &mut self,
        gva: u64,
        place: Place,
        part: &mut [u8],
        access: Access,
    ) -> Result<(), Stop> {
        match place {
            Place::Ram { hva } => {
                // SAFETY: `resolve` returns addresses of guest memory only, and the part stays
                // inside its page.
                if unsafe { load_part(hva, part) }.is_err() {
                    return Err(self.host_fault(gva, access));
                }
            }
            Place::Bus { gpa } => self.bus_read(gpa, part)?,
            Place::Apic { offset } => self.apic_read(offset, part)?,
        }
        self.observe_access(gva, part, false);
        Ok(())
    }

    pub(crate) fn transfer_out(
        &mut self,
        gva: u64,
        places: &[Place; 2],
        bytes: &[u8],
    ) -> Result<(), Stop> {
        let split = bytes.len().min(0x1000 - (gva & 0xfff) as usize);
        let (head, tail) = bytes.split_at(split);
        for (place, part, gva) in [
            (places[0], head, gva),
            (places[1], tail, gva.wrapping_add(split as u64)),
        ] {
            match place {
                _ if part.is_empty() => continue,
                Place::Ram { hva } => {
                    // SAFETY: as in `transfer_in`.
                    if unsafe { store_part(hva, part) }.is_err() {
                        return Err(self.host_fault(gva, self.data_access(Access::WRITE)));
                    }
                    self.wrote(hva, part.len());
                }
                Place::Bus { gpa } => self.bus_write(gpa, part)?,
                Place::Apic { offset } => self.apic_write(offset, part)?,
            }
            self.observe_access(gva, part, true);
        }
        Ok(())
    }

    /// After a slow-path write to guest memory: code there is no longer what was decoded.
    pub(crate) fn wrote(&mut self, hva: u64, len: usize) {
        if self.machine.note_store(hva, len as u64) {
            self.code_changed();
        }
    }

    pub(crate) fn bus_read(&mut self, gpa: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        self.on_bus(|bus| bus.read(gpa, bytes))
    }

    pub(crate) fn bus_write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), Stop> {
        self.on_bus(|bus| bus.write(gpa, bytes))
    }

    /// True if `old` is what was there and `new` is there now; else `old` is made what is there.
    pub(crate) fn bus_exchange(
        &mut self,
        gpa: u64,
        old: &mut [u8],
        new: &[u8],
    ) -> Result<bool, Stop> {
        let mut found = [0; 16];
        let found = &mut found[..old.len()];
        found.copy_from_slice(old);
        self.on_bus(|bus| bus.compare_exchange(gpa, found, new))?;
        let is_exchanged = found == old;
        old.copy_from_slice(found);
        Ok(is_exchanged)
    }

    pub(crate) fn on_bus(
        &mut self,
        access: impl FnOnce(&mut dyn Bus) -> BusResponse,
    ) -> Result<(), Stop> {
        let Some(bus) = self.bus else {
            return Err(self.stop_with(Cause::Unhandled));
        };
        // SAFETY: `bus` is set only while `emulate` runs and points to its argument.
        match access(unsafe { &mut *bus.as_ptr() }) {
            BusResponse::Done => Ok(()),
            BusResponse::Later => Err(self.stop_with(Cause::Later)),
            BusResponse::Fault => Err(self.stop_with(Cause::BusFault)),
        }
    }

    /// The class whose rights an access uses.
    fn class_of(&self, access: Access) -> Class {
        if access.contains(Access::USER) {
            Class::User
        } else if access.contains(Access::IMPLICIT) || !self.supervisor_reaches_user {
            Class::Supervisor
        } else {
            Class::SupervisorUserData
        }
    }

    fn privilege(&self) -> Privilege {
        Privilege {
            pkru: self.state.pkru,
            pkrs: self.state.msrs.pkrs as u32,
            alignment_check: self.state.rflags_rest & Rflags::AC.bits() != 0,
        }
    }

    /// Like [`Vcpu::resolve`], but asks the TLB first: slow accesses (to pages with code, wide or
    /// page-crossing ones) mostly hit it.
    pub(crate) fn resolve_cached(&mut self, gva: u64, access: Access) -> Result<Place, Stop> {
        // An access that is watched, or made with another privilege than the current one, is
        // resolved in full.
        let entry = self.tlb.entry(gva);
        let tag = if access.contains(Access::WRITE) {
            self.tlb.guarded(gva)
        } else {
            entry.read
        };
        let usual = self.data_access(access - Access::USER) == access;
        if usual && !access.contains(Access::IMPLICIT) && tag == gva & PAGE_MASK | self.context {
            let hva = gva.wrapping_add(entry.addend);
            return Ok(Place::Ram { hva });
        }
        self.resolve(gva, access)
    }

    /// Translates one access and fills the TLB; or raises #PF, or stops for a VM exit.
    pub(crate) fn resolve(&mut self, gva: u64, access: Access) -> Result<Place, Stop> {
        let gva = if self.long_mode {
            gva
        } else {
            gva & 0xffff_ffff
        };
        let mut hints = self.mmio_hint.iter().chain(&self.more_hints);
        if let Some(hint) = hints.find(|hint| hint.gva & PAGE_MASK == gva & PAGE_MASK)
            && !access.contains(Access::FETCH)
        {
            return Ok(Place::Bus {
                gpa: hint.gpa & PAGE_MASK | gva & 0xfff,
            });
        }
        self.statistics.tlb_misses += 1;
        let privilege = self.privilege();
        let root = self.guest_root();
        // As below for the second stage: in host-owned tables that is one right with the guest's.
        let is_decided = self.observer.is_some() && self.controls().shadow_root.levels != 0;
        let walked = if is_decided {
            access - Access::FETCH
        } else {
            access
        };
        // Contexts are kept current: the space of fetches is that of all accesses.
        let number = self.fetch_context >> 2;
        if cfg!(debug_assertions) {
            let space = self.space();
            assert_eq!(number << 2, self.tlb.space_bits(&space));
        }
        let mut tables = CachedTables {
            tables: &mut self.second_stage,
            tag: self.tlb.walks.tag(number),
            cache: &mut self.tlb.walks,
        };
        let gva = Gva::new(gva);
        let translated = self
            .paging
            .translate(&mut tables, &root, gva, walked, &privilege);
        let gva = gva.get();
        let translation = match translated {
            Ok(translation) => translation,
            Err(GuestError::PageFault(fault)) => {
                return Err(self.page_fault(gva, fault.error_code.bits() as u32));
            }
            Err(GuestError::Memory { error, .. }) => {
                return Err(self.second_stage_exit(error, gva, access, false));
            }
        };
        let gpa = translation.gpa.get();
        let user_page = translation.rights.contains(Rights::USER);
        // An observed instruction may come from a page that the second stage keeps from being
        // executed: whoever observes it has decided that it runs.
        let stage = match access {
            _ if self.observer.is_some() && access.contains(Access::FETCH) => {
                crate::second_stage::StageAccess::Read
            }
            _ => stage_access(access, user_page),
        };
        let mapped = match self.second_stage.translate(gpa, stage) {
            Ok(mapped) => mapped,
            Err(outcome) => {
                if self.bus.is_some()
                    && !access.contains(Access::FETCH)
                    && outcome.redirectable()
                    && !self.second_stage.pml_full
                {
                    return Ok(Place::Bus { gpa });
                }
                return Err(self.second_stage_exit(outcome, gva, access, true));
            }
        };
        let hva = mapped.hva;
        if self.second_stage.is_apic_access(hva) {
            let offset = (gva & 0xfff) as u32;
            // Whoever emulates an instruction has an APIC of its own on the bus.
            return Ok(match self.bus {
                Some(_) if !access.contains(Access::FETCH) => Place::Bus { gpa },
                _ => Place::Apic { offset },
            });
        }
        let class = self.class_of(access);
        let base = match class {
            Class::User => Access::USER,
            Class::Supervisor => Access::IMPLICIT,
            _ => Access::empty(),
        };
        let protection = self.paging.protection();
        let may = |access: Access| {
            protection
                .check(
                    translation.rights,
                    translation.key,
                    base | access,
                    &privilege,
                )
                .is_ok()
        };
        // A page that holds code takes its writes on the slow path, which tells the code cache.
        let writable =
            translation.rights.contains(Rights::DIRTY) && mapped.writable && may(Access::WRITE);
        let write = writable && !self.machine.has_code(hva);
        let fetch_base = base - Access::IMPLICIT;
        let executable = if user_page {
            mapped.user_executable
        } else {
            mapped.executable
        };
        let fetch = executable
            && protection
                .check(
                    translation.rights,
                    translation.key,
                    fetch_base | Access::FETCH,
                    &privilege,
                )
                .is_ok();
        let read = mapped.readable && may(Access::empty());
        let mut fill = Fill {
            gva,
            hva,
            read,
            write,
            guarded: writable,
            fetch: false,
            shift: translation.page_shift as u8,
            global: translation.rights.contains(Rights::GLOBAL),
        };
        let context = number << 2 | class as u64;
        self.tlb.fill(context, &fill);
        if fetch && access.contains(Access::FETCH) {
            (fill.read, fill.write, fill.fetch) = (false, false, true);
            self.tlb.fill(self.fetch_context, &fill);
        }
        Ok(Place::Ram { hva })
    }

    /// The exit (or internal stop) that a failure of the second stage means.
    #[cold]
    fn second_stage_exit(
        &mut self,
        outcome: Outcome,
        gva: u64,
        access: Access,
        is_final: bool,
    ) -> Stop {
        if std::mem::take(&mut self.second_stage.pml_full) {
            // The access was not made: it comes again when the log has been emptied.
            let mut exit = VmExit::new(ExitReason::PmlFull);
            if self.unblocking_nmi {
                exit.qualification = EptViolation::NMI_UNBLOCKING.bits();
            }
            return self.stop_with(Cause::Exit(exit));
        }
        self.failed_on_access = is_final;
        self.failed_access = access;
        let mut exit = VmExit::new(ExitReason::EptViolation);
        exit.guest_physical_address = outcome.gpa;
        exit.guest_linear_address = gva;
        match outcome.reason {
            Reason::ApicAccess => return self.apic_access_exit(AccessType::Physical, 0),
            Reason::ShadowFault(code) => return self.page_fault(gva, code),
            Reason::Misconfigured => {
                exit.reason = ExitReason::EptMisconfiguration;
                return self.stop_with(Cause::Exit(exit));
            }
            Reason::HostFault => {
                self.host_fault_gpa = Some(outcome.gpa);
            }
            Reason::Violation => {}
        }
        let mut q = EptViolation::LINEAR_VALID | outcome.qualification;
        if is_final {
            q |= EptViolation::FINAL;
            q.set(EptViolation::WRITE, access.contains(Access::WRITE));
            q.set(EptViolation::FETCH, access.contains(Access::FETCH));
            q.set(
                EptViolation::READ,
                !access.intersects(Access::WRITE | Access::FETCH),
            );
        }
        q.set(EptViolation::NMI_UNBLOCKING, self.unblocking_nmi);
        exit.qualification = q.bits();
        self.stop_with(Cause::Exit(exit))
    }

    /// Host memory behind a translation is gone: report it as a violation of that page.
    #[cold]
    pub(crate) fn host_fault(&mut self, gva: u64, access: Access) -> Stop {
        self.tlb.flush();
        self.second_stage.flush();
        let root = self.guest_root();
        let (paging, privilege) = (self.paging, self.privilege());
        let translated = paging.translate(
            &mut self.second_stage,
            &root,
            Gva::new(gva),
            access,
            &privilege,
        );
        self.update_context();
        let outcome = match translated {
            Ok(translation) => Outcome {
                gpa: translation.gpa.get(),
                reason: Reason::HostFault,
                qualification: EptViolation::empty(),
            },
            Err(GuestError::PageFault(fault)) => {
                return self.page_fault(gva, fault.error_code.bits() as u32);
            }
            Err(GuestError::Memory { error, .. }) => {
                return self.second_stage_exit(error, gva, access, false);
            }
        };
        self.second_stage_exit(outcome, gva, access, true)
    }
}

/// Whether `len` bytes at `gva` touch two pages.
#[inline(always)]
pub(crate) fn crosses(gva: u64, len: usize) -> bool {
    (gva & 0xfff) as usize + len > 0x1000
}

fn stage_access(access: Access, user_page: bool) -> crate::second_stage::StageAccess {
    use crate::second_stage::StageAccess;
    if access.contains(Access::WRITE) {
        StageAccess::Write
    } else if access.contains(Access::FETCH) && user_page {
        StageAccess::UserFetch
    } else if access.contains(Access::FETCH) {
        StageAccess::Fetch
    } else {
        StageAccess::Read
    }
}

/// Loads a part of a page; powers of two up to 8 in one access.
///
/// # Safety
/// As for [`HostInt::load`].
pub(crate) unsafe fn load_part(hva: u64, part: &mut [u8]) -> Result<(), HostFault> {
    // SAFETY: as promised by the caller.
    unsafe {
        match part.len() {
            1 => part[0] = u8::load(hva)?,
            2 => part.copy_from_slice(&u16::load(hva)?.to_le_bytes()),
            4 => part.copy_from_slice(&u32::load(hva)?.to_le_bytes()),
            8 => part.copy_from_slice(&u64::load(hva)?.to_le_bytes()),
            16 | 32 => {
                for (i, chunk) in part.chunks_exact_mut(8).enumerate() {
                    chunk.copy_from_slice(&u64::load(hva + 8 * i as u64)?.to_le_bytes());
                }
            }
            _ => host::copy_from(hva, part)?,
        }
    }
    Ok(())
}

/// Stores a part of a page; powers of two up to 8 in one access.
///
/// # Safety
/// As for [`HostInt::store`].
pub(crate) unsafe fn store_part(hva: u64, part: &[u8]) -> Result<(), HostFault> {
    // SAFETY: as promised by the caller.
    unsafe {
        match *part {
            [a] => u8::store(hva, a),
            [a, b] => u16::store(hva, u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::store(hva, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                u64::store(hva, u64::from_le_bytes([a, b, c, d, e, f, g, h]))
            }
            _ => host::copy_to(hva, part),
        }
    }
}
