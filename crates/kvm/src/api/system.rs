//! The system object: what `/dev/kvm` is.

use super::{Cap, VmFd};
use crate::error::{Error, Result, fail};
use crate::run_area::RUN_SIZE;
use crate::vm::Vm;
use crate::{capabilities, cpuid, msrs};
use cpu::Engine;
use kvm_bindings::*;

/// What KVM takes as module parameters: choices for the VMs created from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Two-dimensional paging; without it, guests run on shadow tables.
    pub ept: bool,
    /// Page-modification logging finds what the dirty log reports, which needs EPT; without it,
    /// write protection does.
    pub pml: bool,
    /// Instructions of features that CPUID does not offer raise #UD, all of them. KVM only takes
    /// away those that a control of VT-x or a bit of a control register takes away; the others
    /// execute, and there are guests that execute them unasked.
    pub strict_cpuid: bool,
    /// What executes guest code. Without executable memory it is the interpreter. The
    /// environment variable `EPTIDE_ENGINE` names another default.
    pub engine: Engine,
}

/// The environment variables that stand for `kvm_intel.ept` and `kvm_intel.pml`: `off` or `0` turns
/// one off.
const EPT_VARIABLE: &str = "EPTIDE_EPT";
const PML_VARIABLE: &str = "EPTIDE_PML";
/// The environment variable that stands for [`Options::strict_cpuid`]: `on` or `1` turns it on.
const STRICT_VARIABLE: &str = "EPTIDE_STRICT_CPUID";

impl Default for Options {
    fn default() -> Options {
        let is_on = |variable| {
            let value = std::env::var_os(variable);
            value.is_none_or(|value| value != "off" && value != "0")
        };
        Options {
            ept: is_on(EPT_VARIABLE),
            pml: is_on(PML_VARIABLE),
            strict_cpuid: std::env::var_os(STRICT_VARIABLE)
                .is_some_and(|value| value == "on" || value == "1"),
            engine: Engine::from_environment(),
        }
    }
}

impl Options {
    /// These options with EPT on or off.
    pub fn with_ept(self, ept: bool) -> Options {
        Options { ept, ..self }
    }

    /// These options with page-modification logging on or off.
    pub fn with_pml(self, pml: bool) -> Options {
        Options { pml, ..self }
    }

    /// These options with another engine.
    pub fn with_engine(self, engine: Engine) -> Options {
        Options { engine, ..self }
    }

    /// These options with [`Options::strict_cpuid`] on or off.
    pub fn with_strict_cpuid(self, strict_cpuid: bool) -> Options {
        Options {
            strict_cpuid,
            ..self
        }
    }
}

/// The system object.
#[derive(Debug, Default)]
pub struct Kvm {
    options: Options,
}

impl Kvm {
    /// Opens the system object. Nothing outside the process is involved, so it cannot fail; the
    /// result is there for callers that move over from a real `/dev/kvm`.
    pub fn new() -> Result<Kvm> {
        Ok(Kvm::default())
    }

    /// The system object with options of the caller's choice; [`Kvm::new`] takes the defaults,
    /// which the environment can change.
    pub fn with_options(options: Options) -> Kvm {
        Kvm { options }
    }

    /// KVM_GET_API_VERSION.
    pub fn get_api_version(&self) -> i32 {
        KVM_API_VERSION as i32
    }

    /// KVM_CHECK_EXTENSION by number.
    pub fn check_extension_raw(&self, capability: std::os::raw::c_ulong) -> i32 {
        u32::try_from(capability).map_or(0, capabilities::check)
    }

    /// KVM_CHECK_EXTENSION.
    pub fn check_extension_int(&self, capability: Cap) -> i32 {
        capabilities::check(capability as u32)
    }

    /// Whether a capability is present.
    pub fn check_extension(&self, capability: Cap) -> bool {
        self.check_extension_int(capability) > 0
    }

    /// KVM_GET_VCPU_MMAP_SIZE.
    pub fn get_vcpu_mmap_size(&self) -> Result<usize> {
        Ok(RUN_SIZE)
    }

    /// The recommended number of vCPUs.
    pub fn get_nr_vcpus(&self) -> usize {
        self.check_extension_int(Cap::NrVcpus) as usize
    }

    /// The number of memslots.
    pub fn get_nr_memslots(&self) -> usize {
        self.check_extension_int(Cap::NrMemslots) as usize
    }

    /// The greatest number of vCPUs.
    pub fn get_max_vcpus(&self) -> usize {
        self.check_extension_int(Cap::MaxVcpus) as usize
    }

    /// One more than the highest vCPU ID.
    pub fn get_max_vcpu_id(&self) -> usize {
        self.check_extension_int(Cap::MaxVcpuId) as usize
    }

    /// KVM_GET_SUPPORTED_CPUID.
    pub fn get_supported_cpuid(&self, num_entries: usize) -> Result<CpuId> {
        entries(&cpuid::supported(), num_entries)
    }

    /// KVM_GET_EMULATED_CPUID: no feature is emulated without being supported.
    pub fn get_emulated_cpuid(&self, num_entries: usize) -> Result<CpuId> {
        entries(&[], num_entries)
    }

    /// KVM_GET_MSR_INDEX_LIST.
    pub fn get_msr_index_list(&self) -> Result<MsrList> {
        MsrList::from_entries(&msrs::index_list()).map_err(|_| Error::new(libc::E2BIG))
    }

    /// KVM_GET_MSR_FEATURE_INDEX_LIST.
    pub fn get_msr_feature_index_list(&self) -> Result<MsrList> {
        MsrList::from_entries(&msrs::feature_list()).map_err(|_| Error::new(libc::E2BIG))
    }

    /// KVM_GET_MSRS of the system: feature MSRs. The number that were read, up to the first that
    /// is none.
    pub fn get_msrs(&self, msrs: &mut Msrs) -> Result<usize> {
        let mut read = 0;
        for entry in msrs.as_mut_slice() {
            let Some(value) = msrs::feature(entry.index) else {
                break;
            };
            entry.data = value;
            read += 1;
        }
        Ok(read)
    }

    /// KVM_CREATE_VM.
    pub fn create_vm(&self) -> Result<VmFd> {
        self.create_vm_with_type(KVM_X86_DEFAULT_VM as u64)
    }

    /// KVM_CREATE_VM with a type; only the default one exists.
    pub fn create_vm_with_type(&self, vm_type: u64) -> Result<VmFd> {
        if vm_type != KVM_X86_DEFAULT_VM as u64 {
            return fail(libc::EINVAL);
        }
        Ok(VmFd::new(Vm::new(self.options)?))
    }
}

/// CPUID entries for a caller with room for `room`.
pub(super) fn entries(all: &[kvm_cpuid_entry2], room: usize) -> Result<CpuId> {
    if room > KVM_MAX_CPUID_ENTRIES {
        return fail(libc::ENOMEM);
    }
    if all.len() > room {
        return fail(libc::E2BIG);
    }
    CpuId::from_entries(all).map_err(|_| Error::new(libc::ENOMEM))
}
