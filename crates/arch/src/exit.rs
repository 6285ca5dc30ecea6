//! VM exits: the basic reasons and the information that goes with them.
//!
//! Source: SDM volume 3, appendix "VMX Basic Exit Reasons"; "VM-Exit Information Fields";
//! "Information for VM Exits Due to Instruction Execution".

use crate::interruption::InterruptionInfo;
use bitflags::bitflags;

macro_rules! exit_reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// The basic exit reason.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum ExitReason {
            $($(#[$doc])* $name = $number,)*
        }

        impl ExitReason {
            /// Every reason, in numerical order.
            pub const ALL: &'static [ExitReason] = &[$(ExitReason::$name,)*];

            /// The reason with this number.
            pub fn from_number(number: u16) -> Option<ExitReason> {
                match number {
                    $($number => Some(ExitReason::$name),)*
                    _ => None,
                }
            }

            /// The reason's name as spelt here.
            pub const fn name(self) -> &'static str {
                match self {
                    $(ExitReason::$name => stringify!($name),)*
                }
            }
        }
    };
}

exit_reasons! {
    /// An exception in the exception bitmap, or an NMI with NMI exiting.
    ExceptionOrNmi = 0,
    /// An external interrupt arrived with external-interrupt exiting.
    ExternalInterrupt = 1,
    /// An exception could not be delivered, nor the double fault that followed.
    TripleFault = 2,
    /// An INIT signal arrived.
    InitSignal = 3,
    /// A start-up IPI arrived in wait-for-SIPI state.
    StartupIpi = 4,
    /// An I/O system-management interrupt.
    IoSmi = 5,
    /// Another system-management interrupt.
    OtherSmi = 6,
    /// RFLAGS.IF is set and nothing blocks interrupts, with interrupt-window exiting.
    InterruptWindow = 7,
    /// Nothing blocks NMIs, with NMI-window exiting.
    NmiWindow = 8,
    /// The guest attempted a hardware task switch.
    TaskSwitch = 9,
    /// CPUID.
    Cpuid = 10,
    /// GETSEC.
    Getsec = 11,
    /// HLT with HLT exiting.
    Hlt = 12,
    /// INVD.
    Invd = 13,
    /// INVLPG with INVLPG exiting.
    Invlpg = 14,
    /// RDPMC with RDPMC exiting.
    Rdpmc = 15,
    /// RDTSC with RDTSC exiting.
    Rdtsc = 16,
    /// RSM in SMM.
    Rsm = 17,
    /// VMCALL.
    Vmcall = 18,
    /// VMCLEAR.
    Vmclear = 19,
    /// VMLAUNCH.
    Vmlaunch = 20,
    /// VMPTRLD.
    Vmptrld = 21,
    /// VMPTRST.
    Vmptrst = 22,
    /// VMREAD.
    Vmread = 23,
    /// VMRESUME.
    Vmresume = 24,
    /// VMWRITE.
    Vmwrite = 25,
    /// VMXOFF.
    Vmxoff = 26,
    /// VMXON.
    Vmxon = 27,
    /// A control-register access that the masks, shadows or controls intercept.
    CrAccess = 28,
    /// MOV DR with MOV-DR exiting.
    DrAccess = 29,
    /// An I/O instruction that the I/O controls or bitmaps intercept.
    IoInstruction = 30,
    /// RDMSR that the MSR bitmaps intercept.
    Rdmsr = 31,
    /// WRMSR that the MSR bitmaps intercept.
    Wrmsr = 32,
    /// VM entry failed on a guest-state check.
    InvalidGuestState = 33,
    /// VM entry failed loading MSRs.
    MsrLoadFailure = 34,
    /// MWAIT with MWAIT exiting.
    Mwait = 36,
    /// An instruction completed with the monitor trap flag.
    MonitorTrapFlag = 37,
    /// MONITOR with MONITOR exiting.
    Monitor = 39,
    /// PAUSE with PAUSE exiting or a PAUSE loop.
    Pause = 40,
    /// A machine check struck during VM entry.
    MachineCheckDuringEntry = 41,
    /// The virtual TPR fell below the threshold.
    TprBelowThreshold = 43,
    /// An access to the APIC-access page.
    ApicAccess = 44,
    /// An EOI was virtualized for a vector in the EOI-exit bitmap.
    VirtualizedEoi = 45,
    /// LGDT, LIDT, SGDT or SIDT with descriptor-table exiting.
    GdtrIdtrAccess = 46,
    /// LLDT, LTR, SLDT or STR with descriptor-table exiting.
    LdtrTrAccess = 47,
    /// EPT forbids the access.
    EptViolation = 48,
    /// An EPT entry holds an illegal combination of bits.
    EptMisconfiguration = 49,
    /// INVEPT.
    Invept = 50,
    /// RDTSCP with RDTSC exiting.
    Rdtscp = 51,
    /// The preemption timer counted down to zero.
    PreemptionTimer = 52,
    /// INVVPID.
    Invvpid = 53,
    /// WBINVD or WBNOINVD with WBINVD exiting.
    Wbinvd = 54,
    /// XSETBV.
    Xsetbv = 55,
    /// A write to the virtual-APIC page that needs the hypervisor.
    ApicWrite = 56,
    /// RDRAND with RDRAND exiting.
    Rdrand = 57,
    /// INVPCID with INVLPG exiting.
    Invpcid = 58,
    /// VMFUNC that the controls intercept or that failed.
    Vmfunc = 59,
    /// ENCLS that the controls intercept.
    Encls = 60,
    /// RDSEED with RDSEED exiting.
    Rdseed = 61,
    /// The page-modification log is full.
    PmlFull = 62,
    /// XSAVES that the XSS-exiting bitmap intercepts.
    Xsaves = 63,
    /// XRSTORS that the XSS-exiting bitmap intercepts.
    Xrstors = 64,
    /// UMWAIT with RDTSC exiting.
    Umwait = 67,
    /// TPAUSE with RDTSC exiting.
    Tpause = 68,
    /// A bus lock was asserted with bus-lock detection.
    BusLock = 74,
    /// No interrupt window opened within the notify window.
    Notify = 75,
}

impl ExitReason {
    /// One more than the highest number: the size of a table indexed by reason.
    pub const COUNT: usize = ExitReason::Notify as usize + 1;
}

/// What the processor reports when it leaves VMX non-root operation.
///
/// Fields that a reason does not define are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmExit {
    /// Basic exit reason.
    pub reason: ExitReason,
    /// The entry itself failed (bit 31 of the exit-reason field); guest state is as it was.
    pub entry_failure: bool,
    /// Exit qualification.
    pub qualification: u64,
    /// Guest-linear address.
    pub guest_linear_address: u64,
    /// Guest-physical address.
    pub guest_physical_address: u64,
    /// VM-exit interruption information.
    pub interruption_info: InterruptionInfo,
    /// VM-exit interruption error code.
    pub interruption_error_code: u32,
    /// IDT-vectoring information: the event whose delivery was cut short.
    pub idt_vectoring_info: InterruptionInfo,
    /// IDT-vectoring error code.
    pub idt_vectoring_error_code: u32,
    /// VM-exit instruction length in bytes.
    pub instruction_length: u32,
    /// VM-exit instruction information.
    pub instruction_info: u32,
}

impl VmExit {
    /// An exit with this reason and every other field zero.
    pub const fn new(reason: ExitReason) -> VmExit {
        VmExit {
            reason,
            entry_failure: false,
            qualification: 0,
            guest_linear_address: 0,
            guest_physical_address: 0,
            interruption_info: InterruptionInfo::NONE,
            interruption_error_code: 0,
            idt_vectoring_info: InterruptionInfo::NONE,
            idt_vectoring_error_code: 0,
            instruction_length: 0,
            instruction_info: 0,
        }
    }
}

bitflags! {
    /// Exit qualification of EPT violations.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct EptViolation: u64 {
        /// The access was a data read.
        const READ = 1 << 0;
        /// The access was a data write.
        const WRITE = 1 << 1;
        /// The access was an instruction fetch.
        const FETCH = 1 << 2;
        /// The translation was readable.
        const READABLE = 1 << 3;
        /// The translation was writable.
        const WRITABLE = 1 << 4;
        /// The translation was executable (for supervisor mode with MBEC).
        const EXECUTABLE = 1 << 5;
        /// The translation was executable for user mode (with MBEC).
        const USER_EXECUTABLE = 1 << 6;
        /// The guest-linear-address field is valid.
        const LINEAR_VALID = 1 << 7;
        /// The access was to the translation of the linear address, not to a paging entry.
        const FINAL = 1 << 8;
        /// With advanced information: the linear address is a user-mode address.
        const USER = 1 << 9;
        /// With advanced information: the linear address is read/write.
        const LINEAR_WRITABLE = 1 << 10;
        /// With advanced information: the linear address is execute-disable.
        const LINEAR_NX = 1 << 11;
        /// The exit was taken while IRET unblocked NMIs.
        const NMI_UNBLOCKING = 1 << 12;
        const _ = !0;
    }
}

/// Which control-register instruction an exit reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrAccess {
    /// `MOV CRn, reg`.
    MovTo {
        /// Control register.
        cr: u8,
        /// General-purpose register.
        register: u8,
    },
    /// `MOV reg, CRn`.
    MovFrom {
        /// Control register.
        cr: u8,
        /// General-purpose register.
        register: u8,
    },
    /// `CLTS`.
    Clts,
    /// `LMSW`.
    Lmsw {
        /// The source operand.
        source: u16,
        /// Whether the operand was in memory.
        memory: bool,
    },
}

impl CrAccess {
    /// The exit qualification of control-register accesses.
    pub const fn qualification(self) -> u64 {
        match self {
            CrAccess::MovTo { cr, register } => cr as u64 | (register as u64) << 8,
            CrAccess::MovFrom { cr, register } => cr as u64 | 1 << 4 | (register as u64) << 8,
            CrAccess::Clts => 2 << 4,
            CrAccess::Lmsw { source, memory } => {
                3 << 4 | (memory as u64) << 6 | (source as u64) << 16
            }
        }
    }

    /// Decodes an exit qualification.
    pub const fn from_qualification(q: u64) -> CrAccess {
        let (cr, register) = ((q & 0xf) as u8, (q >> 8 & 0xf) as u8);
        match q >> 4 & 3 {
            0 => CrAccess::MovTo { cr, register },
            1 => CrAccess::MovFrom { cr, register },
            2 => CrAccess::Clts,
            _ => CrAccess::Lmsw {
                source: (q >> 16) as u16,
                memory: q & 1 << 6 != 0,
            },
        }
    }
}

/// Exit qualification of MOV DR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrAccess {
    /// Debug register.
    pub dr: u8,
    /// Whether the instruction reads the debug register.
    pub from: bool,
    /// General-purpose register.
    pub register: u8,
}

impl DrAccess {
    /// The exit qualification.
    pub const fn qualification(self) -> u64 {
        self.dr as u64 | (self.from as u64) << 4 | (self.register as u64) << 8
    }

    /// Decodes an exit qualification.
    pub const fn from_qualification(q: u64) -> DrAccess {
        DrAccess {
            dr: (q & 7) as u8,
            from: q & 1 << 4 != 0,
            register: (q >> 8 & 0xf) as u8,
        }
    }
}

/// Exit qualification of I/O instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoAccess {
    /// Bytes per access: 1, 2 or 4.
    pub size: u8,
    /// IN or INS.
    pub input: bool,
    /// INS or OUTS.
    pub string: bool,
    /// REP-prefixed.
    pub rep: bool,
    /// The port is an immediate operand.
    pub immediate: bool,
    /// Port.
    pub port: u16,
}

impl IoAccess {
    /// The exit qualification.
    pub const fn qualification(self) -> u64 {
        (self.size as u64 - 1)
            | (self.input as u64) << 3
            | (self.string as u64) << 4
            | (self.rep as u64) << 5
            | (self.immediate as u64) << 6
            | (self.port as u64) << 16
    }

    /// Decodes an exit qualification.
    pub const fn from_qualification(q: u64) -> IoAccess {
        IoAccess {
            size: (q & 7) as u8 + 1,
            input: q & 1 << 3 != 0,
            string: q & 1 << 4 != 0,
            rep: q & 1 << 5 != 0,
            immediate: q & 1 << 6 != 0,
            port: (q >> 16) as u16,
        }
    }
}

/// What started a hardware task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TaskSwitchSource {
    /// CALL.
    Call = 0,
    /// IRET.
    Iret = 1,
    /// JMP.
    Jmp = 2,
    /// A task gate in the IDT.
    Idt = 3,
}

/// Exit qualification of task switches.
pub const fn task_switch_qualification(source: TaskSwitchSource, selector: u16) -> u64 {
    selector as u64 | (source as u64) << 30
}

/// What the exit qualification of a task switch says: its source and the selector of the new TSS.
pub const fn task_switch_from_qualification(q: u64) -> (TaskSwitchSource, u16) {
    let source = match q >> 30 & 3 {
        0 => TaskSwitchSource::Call,
        1 => TaskSwitchSource::Iret,
        2 => TaskSwitchSource::Jmp,
        _ => TaskSwitchSource::Idt,
    };
    (source, q as u16)
}

/// Instruction information of string I/O (INS, OUTS).
pub const fn string_io_info(address_size: u8, segment: u8) -> u32 {
    let size = match address_size {
        2 => 0,
        4 => 1,
        _ => 2,
    };
    size << 7 | (segment as u32) << 15
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_round_trip() {
        for &reason in ExitReason::ALL {
            assert_eq!(ExitReason::from_number(reason as u16), Some(reason));
        }
        assert_eq!(ExitReason::from_number(35), None);
        assert_eq!(
            ExitReason::EptMisconfiguration.name(),
            "EptMisconfiguration"
        );
    }

    #[test]
    fn qualifications_round_trip() {
        for access in [
            CrAccess::MovTo { cr: 3, register: 9 },
            CrAccess::MovFrom {
                cr: 8,
                register: 15,
            },
            CrAccess::Clts,
            CrAccess::Lmsw {
                source: 0xfff1,
                memory: true,
            },
        ] {
            assert_eq!(CrAccess::from_qualification(access.qualification()), access);
        }
        let io = IoAccess {
            size: 4,
            input: true,
            string: true,
            rep: false,
            immediate: false,
            port: 0xcf8,
        };
        assert_eq!(IoAccess::from_qualification(io.qualification()), io);
        let dr = DrAccess {
            dr: 7,
            from: true,
            register: 12,
        };
        assert_eq!(DrAccess::from_qualification(dr.qualification()), dr);
        for source in [
            TaskSwitchSource::Call,
            TaskSwitchSource::Iret,
            TaskSwitchSource::Jmp,
            TaskSwitchSource::Idt,
        ] {
            let qualification = task_switch_qualification(source, 0xfff8);
            assert_eq!(
                task_switch_from_qualification(qualification),
                (source, 0xfff8)
            );
        }
    }
}
