//! `eptide doctor`: what this host offers, what guests will see, what limits apply.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use kvm::{Cap, Kvm};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use packages::Package;

use crate::machine::{MachineError, hypervisor};

/// Prints the report.
pub(crate) fn run() -> Result<(), MachineError> {
    let mut text = String::new();
    section(&mut text, "this host", &host());
    let kvm = hypervisor::open(None, None);
    section(&mut text, "what guests see", &guest(&kvm));
    section(&mut text, "limits", &limits(&kvm));
    section(&mut text, "guest material", &material());
    print!("{text}");
    Ok(())
}

type Line = (&'static str, String);

/// Width of a line's text, after its name.
const WIDTH: usize = 76;

fn section(text: &mut String, title: &str, lines: &[Line]) {
    let _ = writeln!(text, "{title}");
    for (name, value) in lines {
        let mut name = *name;
        for part in wrap(value, WIDTH) {
            let _ = writeln!(text, "  {name:<18} {part}");
            name = "";
        }
    }
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("there is always a line");
        if line.is_empty() {
            line.push_str(word);
        } else if line.len() + 1 + word.len() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.into());
        }
    }
    lines
}

fn host() -> Vec<Line> {
    let field = |file: &str, key: &str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let line = text
            .lines()
            .find(|line| line.starts_with(key))
            .map(str::to_owned);
        line.and_then(|line| Some(line.split_once(':')?.1.trim().to_owned()))
            .unwrap_or_else(|| "unknown".into())
    };
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let kvm = match Path::new("/dev/kvm").exists() {
        true => "there; Eptide does not use it",
        false => "not there; Eptide does not need it",
    };
    vec![
        ("processor", field("/proc/cpuinfo", "model name")),
        ("usable processors", processors.to_string()),
        ("free memory", field("/proc/meminfo", "MemAvailable")),
        ("kernel", release.trim().into()),
        ("/dev/kvm", kvm.into()),
    ]
}

fn guest(kvm: &Kvm) -> Vec<Line> {
    let supported = match kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES) {
        Ok(supported) => supported,
        Err(error) => return vec![("processor", format!("KVM_GET_SUPPORTED_CPUID: {error}"))],
    };
    vec![
        ("vendor", vendor(&supported)),
        ("processor", brand(&supported)),
        ("hypervisor", signature(&supported)),
        ("addresses", address_sizes(&supported)),
        ("features", named(&supported, &FEATURES).join(" ")),
        ("KVM features", named(&supported, &KVM_FEATURES).join(" ")),
    ]
}

fn leaf(cpuid: &CpuId, function: u32) -> Option<&kvm_cpuid_entry2> {
    cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == function && entry.index == 0)
}

fn text_of(words: &[u32]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes)
        .trim_matches(['\0', ' '])
        .to_owned()
}

fn vendor(cpuid: &CpuId) -> String {
    leaf(cpuid, 0).map_or_else(String::new, |entry| {
        text_of(&[entry.ebx, entry.edx, entry.ecx])
    })
}

fn brand(cpuid: &CpuId) -> String {
    let words: Vec<u32> = (0x8000_0002..=0x8000_0004)
        .filter_map(|function| leaf(cpuid, function))
        .flat_map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
        .collect();
    text_of(&words)
}

fn signature(cpuid: &CpuId) -> String {
    leaf(cpuid, 0x4000_0000).map_or_else(
        || "none".into(),
        |entry| text_of(&[entry.ebx, entry.ecx, entry.edx]),
    )
}

fn address_sizes(cpuid: &CpuId) -> String {
    match leaf(cpuid, 0x8000_0008) {
        Some(entry) => {
            format!(
                "{} bits physical, {} bits virtual",
                entry.eax & 0xff,
                entry.eax >> 8 & 0xff
            )
        }
        None => "36 bits physical, 48 bits virtual (assumed)".into(),
    }
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A CPUID bit: leaf, register, bit, name.
type Feature = (u32, Register, u32, &'static str);

/// Bits worth naming, by the names of Linux's `/proc/cpuinfo`.
const FEATURES: [Feature; 41] = [
    (1, Register::Edx, 0, "fpu"),
    (1, Register::Edx, 4, "tsc"),
    (1, Register::Edx, 15, "cmov"),
    (1, Register::Edx, 25, "sse"),
    (1, Register::Edx, 26, "sse2"),
    (1, Register::Ecx, 0, "pni"),
    (1, Register::Ecx, 1, "pclmulqdq"),
    (1, Register::Ecx, 5, "vmx"),
    (1, Register::Ecx, 9, "ssse3"),
    (1, Register::Ecx, 12, "fma"),
    (1, Register::Ecx, 13, "cx16"),
    (1, Register::Ecx, 17, "pcid"),
    (1, Register::Ecx, 19, "sse4_1"),
    (1, Register::Ecx, 20, "sse4_2"),
    (1, Register::Ecx, 21, "x2apic"),
    (1, Register::Ecx, 22, "movbe"),
    (1, Register::Ecx, 23, "popcnt"),
    (1, Register::Ecx, 24, "tsc_deadline_timer"),
    (1, Register::Ecx, 25, "aes"),
    (1, Register::Ecx, 26, "xsave"),
    (1, Register::Ecx, 28, "avx"),
    (1, Register::Ecx, 30, "rdrand"),
    (7, Register::Ebx, 0, "fsgsbase"),
    (7, Register::Ebx, 3, "bmi1"),
    (7, Register::Ebx, 5, "avx2"),
    (7, Register::Ebx, 7, "smep"),
    (7, Register::Ebx, 8, "bmi2"),
    (7, Register::Ebx, 9, "erms"),
    (7, Register::Ebx, 10, "invpcid"),
    (7, Register::Ebx, 16, "avx512f"),
    (7, Register::Ebx, 18, "rdseed"),
    (7, Register::Ebx, 20, "smap"),
    (7, Register::Ebx, 29, "sha_ni"),
    (7, Register::Ecx, 3, "pku"),
    (7, Register::Ecx, 16, "la57"),
    (0x8000_0001, Register::Edx, 20, "nx"),
    (0x8000_0001, Register::Edx, 26, "pdpe1gb"),
    (0x8000_0001, Register::Edx, 27, "rdtscp"),
    (0x8000_0001, Register::Edx, 29, "lm"),
    (0x8000_0001, Register::Ecx, 0, "lahf_lm"),
    (0x8000_0001, Register::Ecx, 2, "svm"),
];

/// KVM's paravirtual features (leaf 0x40000001, EAX).
const KVM_FEATURES: [Feature; 9] = [
    (0x4000_0001, Register::Eax, 3, "kvmclock"),
    (0x4000_0001, Register::Eax, 24, "kvmclock_stable"),
    (0x4000_0001, Register::Eax, 5, "steal_time"),
    (0x4000_0001, Register::Eax, 6, "pv_eoi"),
    (0x4000_0001, Register::Eax, 7, "pv_unhalt"),
    (0x4000_0001, Register::Eax, 9, "pv_tlb_flush"),
    (0x4000_0001, Register::Eax, 4, "async_pf"),
    (0x4000_0001, Register::Eax, 11, "pv_send_ipi"),
    (0x4000_0001, Register::Eax, 13, "pv_sched_yield"),
];

/// The names of the bits in `table` that are set.
fn named(cpuid: &CpuId, table: &[Feature]) -> Vec<&'static str> {
    let has = |function, register, bit: u32| {
        leaf(cpuid, function).is_some_and(|entry| {
            let value = match register {
                Register::Eax => entry.eax,
                Register::Ebx => entry.ebx,
                Register::Ecx => entry.ecx,
                Register::Edx => entry.edx,
            };
            value >> bit & 1 != 0
        })
    };
    let set = table
        .iter()
        .filter(|(function, register, bit, _)| has(*function, *register, *bit));
    set.map(|(_, _, _, name)| *name).collect()
}

fn limits(kvm: &Kvm) -> Vec<Line> {
    const CAPABILITIES: [(Cap, &str); 10] = [
        (Cap::Irqchip, "interrupt controllers"),
        (Cap::Pit2, "PIT"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::TscDeadlineTimer, "TSC-deadline timer"),
        (Cap::AdjustClock, "clock"),
        (Cap::Xsave, "XSAVE"),
        (Cap::Debugregs, "debug registers"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::ReadonlyMem, "read-only memory"),
    ];
    let chosen = |wanted: bool| {
        let chosen = CAPABILITIES
            .iter()
            .filter(|(cap, _)| kvm.check_extension(*cap) == wanted);
        chosen.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    };
    let mut lines = vec![
        ("KVM API", kvm.get_api_version().to_string()),
        ("processors", format!("{} at most", kvm.get_max_vcpus())),
        ("memory slots", kvm.get_nr_memslots().to_string()),
        ("offered", chosen(true)),
    ];
    let missing = chosen(false);
    if !missing.is_empty() {
        lines.push(("not offered", missing));
    }
    lines
}

fn material() -> Vec<Line> {
    let cache = match packages::cache_folder() {
        Ok(cache) => cache,
        Err(error) => return vec![("cache folder", error.to_string())],
    };
    let mut lines = vec![("cache folder", cache.display().to_string())];
    for name in ["linux-image-cloud-amd64", "busybox-static"] {
        let found = Package::cached(&cache, name).map(|package| package.version);
        let found = found.unwrap_or_else(|| format!("{name} not fetched yet; `eptide demo` does"));
        lines.push(("package", found));
    }
    for tool in ["apt-get", "dpkg-deb"] {
        let works = Command::new(tool).arg("--version").output().is_ok();
        lines.push((
            tool,
            if works {
                "there"
            } else {
                "missing: packages cannot be fetched"
            }
            .into(),
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpuid() -> CpuId {
        let entry = |function, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        CpuId::from_entries(&[
            entry(0, [0xd, word(b"Genu"), word(b"ntel"), word(b"ineI")]),
            entry(1, [0, 0, 1 << 21, 1 << 26]),
            entry(
                0x4000_0000,
                [0, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")],
            ),
            entry(0x4000_0001, [1 << 3 | 1 << 24, 0, 0, 0]),
            entry(0x8000_0008, [0x302e, 0, 0, 0]),
        ])
        .unwrap()
    }

    #[test]
    fn cpuid_is_read_as_the_manual_says() {
        let cpuid = cpuid();
        assert_eq!(vendor(&cpuid), "GenuineIntel");
        assert_eq!(signature(&cpuid), "KVMKVMKVM");
        assert_eq!(named(&cpuid, &FEATURES), ["sse2", "x2apic"]);
        assert_eq!(
            named(&cpuid, &KVM_FEATURES),
            ["kvmclock", "kvmclock_stable"]
        );
        assert_eq!(address_sizes(&cpuid), "46 bits physical, 48 bits virtual");
    }

    #[test]
    fn long_lines_wrap_under_their_name() {
        let mut text = String::new();
        section(
            &mut text,
            "title",
            &[("name", "word ".repeat(30).trim().to_owned())],
        );
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("  name") && lines[2].starts_with("       "));
        assert!(lines.iter().all(|line| line.len() <= 21 + WIDTH));
    }
}
