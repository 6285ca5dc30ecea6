//! A machine to test the MMU with: memory from the kernel, and processors that walk the tables as
//! hardware does, with a TLB of their own.

#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]

use arch::addr::{Gfn, Gpa, Hva, PAGE_SIZE};
use arch::page_fault::ErrorCode;
use arch::paging::{
    Entry as TableEntry, EptAccess, EptError, EptFault, EptFeatures, EptPaging, EptRights,
    Exchange, Level, TableMemory,
};
use eptide_mmu::{
    AddressSpace, Config, ConfigError, Entry, FaultResult, Flush, HostAccess, HostMemory,
    MemoryRegion, Mmu, Processors, SlotError, Vcpu,
};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Host memory, aligned so that huge pages can be congruent.
pub struct Ram {
    mapping: *mut libc::c_void,
    mapped: usize,
    base: u64,
    pub size: u64,
}

// SAFETY: plain memory; tests access it through atomics or volatile accesses.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    pub fn new(size: u64) -> Self {
        Self::aligned(size, 1 << 21)
    }

    pub fn aligned(size: u64, align: u64) -> Self {
        let mapped = (size + align) as usize;
        // Miri knows no unreserved mappings; there, nothing touches most of the memory.
        let unreserved = if cfg!(miri) { 0 } else { libc::MAP_NORESERVE };
        // SAFETY: a new mapping at an address the kernel chooses.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | unreserved,
                -1,
                0,
            )
        };
        assert_ne!(mapping, libc::MAP_FAILED);
        let base = (mapping.expose_provenance() as u64).next_multiple_of(align);
        Self {
            mapping,
            mapped,
            base,
            size,
        }
    }

    pub fn hva(&self) -> Hva {
        Hva::new(self.base)
    }

    pub fn protect(&self, offset: u64, length: u64, protection: i32) {
        // SAFETY: part of the mapping.
        let result =
            unsafe { libc::mprotect((self.base + offset) as *mut _, length as usize, protection) };
        assert_eq!(result, 0);
    }

    pub fn word(&self, offset: u64) -> &AtomicU64 {
        // SAFETY: inside the mapping, aligned.
        unsafe { &*std::ptr::with_exposed_provenance((self.base + offset) as usize) }
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping, which nothing uses any more.
        unsafe { libc::munmap(self.mapping, self.mapped) };
    }
}

/// Processors that run on the threads that ask: nobody has to be kicked.
pub struct Idle;
impl Processors for Idle {
    fn kick(&self, _: u32) {}
}

/// A place where another thread may run, under the model checker.
pub fn point() {
    #[cfg(feature = "model")]
    shuttle::sync::atomic::AtomicBool::new(false).load(Ordering::SeqCst);
}

/// The hardware's way to EPT entries.
pub struct HostTables;

impl TableMemory for HostTables {
    type Error = std::convert::Infallible;
    type Handle = ();

    fn read<E: TableEntry>(
        &mut self,
        address: u64,
        _: Level,
    ) -> Result<(E, ()), std::convert::Infallible> {
        point();
        // SAFETY: the MMU's tables hold addresses of its table pages, allocated while a processor
        // is in guest mode.
        let entry = unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(address as usize) };
        let entry = entry.load(Ordering::Acquire);
        assert_ne!(
            entry, 0x0dea_d000_dead_0000,
            "a processor reached a freed table"
        );
        Ok((E::from_u64(entry), ()))
    }

    fn compare_exchange<E: TableEntry>(
        &mut self,
        (): (),
        address: u64,
        old: E,
        new: E,
    ) -> Result<Exchange, std::convert::Infallible> {
        // SAFETY: as above.
        let entry = unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(address as usize) };
        let exchange = entry.compare_exchange(
            old.to_u64(),
            new.to_u64(),
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        Ok(if exchange.is_ok() {
            Exchange::Written
        } else {
            Exchange::Changed
        })
    }
}

#[derive(Clone, Copy)]
struct Cached {
    hva: u64,
    rights: EptRights,
    is_dirty: bool,
}

/// What became of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It reached that host address.
    Memory(u64),
    /// The guest left guest mode with that verdict.
    Exit(FaultResult),
}

/// A processor with its vCPU.
pub struct Cpu {
    pub mmu: Arc<Mmu>,
    pub vcpu: Vcpu,
    ept: EptPaging,
    tlb: HashMap<u64, Cached>,
    /// Faults of the last access.
    pub faults: Vec<FaultResult>,
}

impl Cpu {
    pub fn new(mmu: &Arc<Mmu>, id: u32) -> Self {
        let mut features =
            EptFeatures::EXECUTE_ONLY | EptFeatures::PAGES_2M | EptFeatures::PAGES_1G;
        features.set(EptFeatures::ACCESSED_DIRTY, mmu.config().accessed_dirty);
        let ept = EptPaging::new(mmu.config().levels, features, 52).unwrap();
        let vcpu = mmu.create_vcpu(id);
        Self {
            mmu: Arc::clone(mmu),
            vcpu,
            ept,
            tlb: HashMap::new(),
            faults: Vec::new(),
        }
    }

    /// Enters or leaves system management mode, with the flush that a processor does which does not
    /// tell EPTPs apart.
    pub fn set_address_space(&mut self, space: AddressSpace) {
        self.vcpu.set_address_space(space);
        self.tlb.clear();
    }

    pub fn read(&mut self, gpa: u64) -> Outcome {
        self.access(gpa, EptAccess::READ)
    }

    pub fn write(&mut self, gpa: u64) -> Outcome {
        self.access(gpa, EptAccess::WRITE)
    }

    pub fn fetch(&mut self, gpa: u64) -> Outcome {
        self.access(gpa, EptAccess::FETCH)
    }

    /// Performs a guest store of a word.
    pub fn store(&mut self, gpa: u64, value: u64) -> Outcome {
        self.access_with(gpa, EptAccess::WRITE, |hva| {
            // SAFETY: an address that the tables gave, in guest mode.
            unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(hva as usize) }
                .store(value, Ordering::Release);
        })
    }

    pub fn access(&mut self, gpa: u64, access: EptAccess) -> Outcome {
        self.access_with(gpa, access, |_| {})
    }

    /// Runs one access as a vCPU loop would, until it is done or ends in an exit for user space.
    pub fn access_with(&mut self, gpa: u64, access: EptAccess, then: impl Fn(u64)) -> Outcome {
        self.faults.clear();
        loop {
            let eptp = self.mmu.load(&mut self.vcpu).unwrap();
            match self.vcpu.gate().enter() {
                Entry::Ready => {}
                Entry::Flush(flush) => {
                    self.flush(&flush);
                    continue;
                }
            }
            let found = self.translate(eptp.root(), gpa, access);
            if let Ok(hva) = found {
                then(hva);
            }
            self.vcpu.gate().exit();
            let code = match found {
                Ok(hva) => return Outcome::Memory(hva),
                Err(code) => code,
            };
            let result = self
                .mmu
                .handle_page_fault(&mut self.vcpu, Gpa::new(gpa), code);
            self.faults.push(result);
            assert!(self.faults.len() < 1000, "no progress: {result:?}");
            // A retry waits for another thread.
            #[cfg(feature = "model")]
            if result == FaultResult::Retry {
                shuttle::thread::yield_now();
            }
            match result {
                FaultResult::Fixed | FaultResult::Spurious | FaultResult::Retry => {}
                other => return Outcome::Exit(other),
            }
        }
    }

    fn flush(&mut self, flush: &Flush) {
        match flush {
            Flush::All => self.tlb.clear(),
            Flush::Range(range) => {
                self.tlb.retain(|&gfn, _| !range.contains(&Gfn::new(gfn)));
            }
        }
    }

    fn translate(&mut self, root: u64, gpa: u64, access: EptAccess) -> Result<u64, ErrorCode> {
        let (gfn, offset) = (gpa / PAGE_SIZE, gpa % PAGE_SIZE);
        if let Some(cached) = self.tlb.get(&gfn) {
            let may_write = cached.is_dirty || !access.contains(EptAccess::WRITE);
            if cached.rights.contains(access.needs()) && may_write {
                return Ok(cached.hva + offset);
            }
        }
        match self
            .ept
            .translate(&mut HostTables, root, Gpa::new(gpa), access)
        {
            Ok(found) => {
                let cached = Cached {
                    hva: found.address & !(PAGE_SIZE - 1),
                    rights: found.rights,
                    is_dirty: found.is_dirty,
                };
                self.tlb.insert(gfn, cached);
                Ok(found.address)
            }
            Err(EptError::Fault(EptFault::Misconfiguration { .. })) => Err(ErrorCode::RSVD),
            Err(EptError::Fault(EptFault::Violation(violation))) => {
                // As the architecture says, a violation drops what is cached for the address.
                self.tlb.remove(&gfn);
                let mut code = ErrorCode::GUEST_FINAL;
                code.set(ErrorCode::USER, access.contains(EptAccess::READ));
                code.set(ErrorCode::WRITE, access.contains(EptAccess::WRITE));
                code.set(ErrorCode::FETCH, access.contains(EptAccess::FETCH));
                code.set(ErrorCode::PRESENT, !violation.rights.is_empty());
                Err(code)
            }
        }
    }
}

/// An MMU on the memory of this process. Miri knows no way to ask the kernel about it.
pub fn try_mmu(config: Config) -> Result<Arc<Mmu>, ConfigError> {
    if cfg!(miri) {
        Mmu::with_host(config, Arc::new(Idle), Box::new(AlwaysThere))
    } else {
        Mmu::new(config, Arc::new(Idle))
    }
}

pub fn mmu(config: Config) -> Arc<Mmu> {
    try_mmu(config).unwrap()
}

/// Host memory that is taken to be there.
pub struct AlwaysThere;
impl HostMemory for AlwaysThere {
    fn populate(&self, _: Range<Hva>, _: HostAccess) -> bool {
        true
    }
}

pub fn region(number: u16, base: u64, size: u64, hva: Hva) -> MemoryRegion {
    MemoryRegion {
        space: AddressSpace::Normal,
        number,
        flags: 0,
        base: Gpa::new(base),
        size,
        hva,
    }
}

pub fn log_dirty(region: MemoryRegion) -> MemoryRegion {
    MemoryRegion { flags: 1, ..region }
}

pub fn delete(mmu: &Mmu, number: u16) -> Result<(), SlotError> {
    mmu.set_memory_region(&region(number, 0, 0, Hva::new(0)))
}
