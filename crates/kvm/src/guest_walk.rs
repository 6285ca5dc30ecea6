//! Guest-linear memory as KVM itself accesses it: string I/O, KVM_TRANSLATE, instruction bytes.
//!
//! The walk is the architecture's ([`arch::paging`]), reading the guest's tables through the
//! memslots.

use crate::events::PendingException;
use crate::vcpu::{Core, Vcpu};
use arch::addr::{Gpa, Gva};
use arch::control_registers::{Cr4, Rflags};
use arch::cpuid::Feature;
use arch::exception::Exception;
use arch::paging::{
    Access, Entry, Exchange, GuestControls, GuestError, GuestPaging, GuestRoot, Level, Privilege,
    TableMemory, Translation,
};
use mmu::{AccessError, AddressSpace, Mmu};
use std::ops::Range;

/// The guest's tables.
struct Tables<'a> {
    mmu: &'a Mmu,
    space: AddressSpace,
    /// Whether accessed and dirty bits are written.
    marks: bool,
}

/// A table that is not in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoTable;

impl TableMemory for Tables<'_> {
    type Error = NoTable;
    type Handle = ();

    fn read<E: Entry>(&mut self, address: u64, _level: Level) -> Result<(E, ()), NoTable> {
        let mut bytes = [0; 8];
        let size = E::SIZE as usize;
        let read = self
            .mmu
            .read_guest(self.space, Gpa::new(address), &mut bytes[..size]);
        read.map_err(|_| NoTable)?;
        Ok((E::from_u64(u64::from_le_bytes(bytes)), ()))
    }

    fn compare_exchange<E: Entry>(
        &mut self,
        _handle: (),
        address: u64,
        old: E,
        new: E,
    ) -> Result<Exchange, NoTable> {
        if !self.marks {
            return Ok(Exchange::Ignored);
        }
        let gpa = Gpa::new(address);
        let (mut old, new) = (old.to_u64().to_le_bytes(), new.to_u64().to_le_bytes());
        let size = E::SIZE as usize;
        let exchanged =
            self.mmu
                .compare_exchange_guest(self.space, gpa, &mut old[..size], &new[..size]);
        let written = match exchanged {
            Ok(written) => written,
            Err(AccessError::ReadOnly(_)) => return Ok(Exchange::Ignored),
            Err(_) => return Err(NoTable),
        };
        Ok(if written {
            Exchange::Written
        } else {
            Exchange::Changed
        })
    }
}

/// Why guest-linear memory was not accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinearError {
    /// The guest's tables forbid it: this exception is due.
    Fault(PendingException),
    /// It leads to where there is no memory.
    NoMemory,
    /// The host memory behind this address is gone.
    HostMemory(Gpa),
}

impl From<AccessError> for LinearError {
    fn from(error: AccessError) -> LinearError {
        match error {
            AccessError::HostMemory(gpa, _) => LinearError::HostMemory(gpa),
            _ => LinearError::NoMemory,
        }
    }
}

impl Core {
    fn guest_paging(&self) -> GuestPaging {
        let state = &self.cpu.state;
        GuestPaging::new(&GuestControls {
            cr0: state.cr0,
            cr4: state.cr4,
            efer: state.efer,
            physical_bits: self.cpuid.physical_bits() as u32,
            has_1g_pages: self.features.has(Feature::PDPE1GB),
            has_pse36: self.features.has(Feature::PSE36),
        })
    }

    /// Translates a linear address. With `marks`, as an access that takes place.
    pub(crate) fn translate(
        &self,
        vcpu: &Vcpu,
        gva: u64,
        access: Access,
        marks: bool,
    ) -> Result<Translation, GuestError<NoTable>> {
        let state = &self.cpu.state;
        let root = GuestRoot {
            cr3: state.cr3,
            pdptes: state.pdptes,
        };
        let privilege = Privilege {
            pkru: state.pkru,
            pkrs: state.msrs.pkrs as u32,
            alignment_check: state.rflags() & Rflags::AC.bits() != 0,
        };
        let mut tables = Tables {
            mmu: &vcpu.vm().mmu,
            space: self.mmu.address_space(),
            marks,
        };
        self.guest_paging()
            .translate(&mut tables, &root, Gva::new(gva), access, &privilege)
    }

    /// The physical address of a linear one for an access by the current instruction.
    fn linear_to_physical(
        &self,
        vcpu: &Vcpu,
        gva: u64,
        access: Access,
    ) -> Result<Gpa, LinearError> {
        let bits = if self.cpu.state.cr4.contains(Cr4::LA57) {
            57
        } else {
            48
        };
        if self.is_64bit() && !Gva::new(gva).is_canonical(bits) {
            return Err(LinearError::Fault(PendingException {
                vector: Exception::GeneralProtection.vector(),
                error_code: Some(0),
                payload: None,
            }));
        }
        match self.translate(vcpu, gva, access, true) {
            Ok(translation) => Ok(translation.gpa),
            Err(GuestError::PageFault(fault)) => Err(LinearError::Fault(PendingException {
                vector: Exception::PageFault.vector(),
                error_code: Some(fault.error_code.bits() as u32),
                payload: Some(gva),
            })),
            Err(GuestError::Memory { .. }) => Err(LinearError::NoMemory),
        }
    }

    /// The access rights with which the current instruction accesses data.
    fn data_access(&self, write: bool) -> Access {
        let mut access = Access::empty();
        access.set(Access::WRITE, write);
        access.set(Access::USER, self.cpu.state.cpl() == 3);
        access
    }

    /// Reads linear memory for the current instruction.
    pub(crate) fn read_linear(
        &self,
        vcpu: &Vcpu,
        gva: u64,
        bytes: &mut [u8],
    ) -> Result<(), LinearError> {
        self.read_linear_as(vcpu, gva, bytes, self.data_access(false))
    }

    /// Reads linear memory as the processor reads its own structures, whatever the privilege level.
    pub(crate) fn read_system(
        &self,
        vcpu: &Vcpu,
        gva: u64,
        bytes: &mut [u8],
    ) -> Result<(), LinearError> {
        self.read_linear_as(vcpu, gva, bytes, Access::IMPLICIT)
    }

    fn read_linear_as(
        &self,
        vcpu: &Vcpu,
        gva: u64,
        bytes: &mut [u8],
        access: Access,
    ) -> Result<(), LinearError> {
        let space = self.mmu.address_space();
        self.by_page(vcpu, gva, bytes.len(), access, |mmu, gpa, part| {
            mmu.read_guest(space, gpa, &mut bytes[part])
        })
    }

    /// Does something to each page's part of linear memory, in order, with its physical address.
    fn by_page(
        &self,
        vcpu: &Vcpu,
        gva: u64,
        length: usize,
        access: Access,
        mut then: impl FnMut(&Mmu, Gpa, Range<usize>) -> Result<(), AccessError>,
    ) -> Result<(), LinearError> {
        let mut done = 0;
        while done < length {
            let at = gva.wrapping_add(done as u64);
            let part = done..done + page_part(at, length - done);
            done = part.end;
            let gpa = self.linear_to_physical(vcpu, at, access)?;
            then(&vcpu.vm().mmu, gpa, part)?;
        }
        Ok(())
    }

    /// Checks that linear memory is there and can be written by the current instruction.
    pub(crate) fn probe_write_linear(
        &self,
        vcpu: &Vcpu,
        gva: u64,
        length: usize,
    ) -> Result<(), LinearError> {
        let space = self.mmu.address_space();
        let access = self.data_access(true);
        self.by_page(vcpu, gva, length, access, |mmu, gpa, _| {
            mmu.takes_writes(space, gpa)
        })
    }

    /// Checks that linear memory can be written as the processor writes its own structures.
    pub(crate) fn probe_write_system(
        &self,
        vcpu: &Vcpu,
        gva: u64,
        length: usize,
    ) -> Result<(), LinearError> {
        let access = Access::IMPLICIT | Access::WRITE;
        self.by_page(vcpu, gva, length, access, |_, _, _| Ok(()))
    }

    /// Writes linear memory for the current instruction.
    pub(crate) fn write_linear(
        &self,
        vcpu: &Vcpu,
        gva: u64,
        bytes: &[u8],
    ) -> Result<(), LinearError> {
        self.write_linear_as(vcpu, gva, bytes, self.data_access(true))
    }

    /// Writes linear memory as the processor writes its own structures.
    pub(crate) fn write_system(
        &self,
        vcpu: &Vcpu,
        gva: u64,
        bytes: &[u8],
    ) -> Result<(), LinearError> {
        self.write_linear_as(vcpu, gva, bytes, Access::IMPLICIT | Access::WRITE)
    }

    fn write_linear_as(
        &self,
        vcpu: &Vcpu,
        gva: u64,
        bytes: &[u8],
        access: Access,
    ) -> Result<(), LinearError> {
        let space = self.mmu.address_space();
        self.by_page(vcpu, gva, bytes.len(), access, |mmu, gpa, part| {
            mmu.write_guest(space, gpa, &bytes[part])
        })
    }

    /// The bytes at RIP that can be read, at most 15.
    pub(crate) fn instruction_bytes(&self, vcpu: &Vcpu) -> ([u8; 15], usize) {
        let state = &self.cpu.state;
        let mut access = Access::FETCH;
        access.set(Access::USER, state.cpl() == 3);
        let mut bytes = [0; 15];
        let mut done = 0;
        while done < bytes.len() {
            let at = self.linear_rip().wrapping_add(done as u64);
            let part = page_part(at, bytes.len() - done);
            let Ok(found) = self.translate(vcpu, at, access, false) else {
                break;
            };
            let space = self.mmu.address_space();
            let into = &mut bytes[done..done + part];
            if vcpu.vm().mmu.read_guest(space, found.gpa, into).is_err() {
                break;
            }
            done += part;
        }
        (bytes, done)
    }
}

fn page_part(address: u64, length: usize) -> usize {
    length.min(4096 - (address & 0xfff) as usize)
}
