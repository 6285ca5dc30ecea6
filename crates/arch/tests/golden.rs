//! Golden walks: tables in, access in; verdict, rights and written bits out.
//!
//! The files in `golden/` hold two lines a case:
//!
//! ```text
//! 4-level wp nxe | 4=pwu 3=pwu 2=pwu 1=pu | write user
//!   #PF P W U, level 1
//! ```
//!
//! Before the first bar: the format and the control bits that are on. Then the entries from the top
//! down: letters set bits (see `LETTERS`), `+n` sets bit n. Then the access. The second line is the
//! verdict: for a translation, page size, rights and the bits the walk wrote, by level.
//!
//! The naive walker must agree with every verdict. `EPTIDE_BLESS=1 cargo test -p eptide-arch --test
//! golden` writes the verdicts anew; the diff is to be reviewed.

mod naive;

use eptide_arch::addr::{Gpa, Gva};
use eptide_arch::control_registers::{Cr0, Cr4, Efer};
use eptide_arch::page_fault::ErrorCode;
use eptide_arch::paging::*;
use naive::{EptVerdict, Memory};
use std::convert::Infallible;
use std::fmt::Write;
use std::path::Path;

struct Tables<'a>(&'a mut Memory);

impl TableMemory for Tables<'_> {
    type Error = Infallible;
    type Handle = ();

    fn read<E: Entry>(&mut self, address: u64, _: Level) -> Result<(E, ()), Infallible> {
        Ok((E::from_u64(self.0.get(&address).copied().unwrap_or(0)), ()))
    }

    fn compare_exchange<E: Entry>(
        &mut self,
        (): (),
        address: u64,
        old: E,
        new: E,
    ) -> Result<Exchange, Infallible> {
        assert_eq!(E::from_u64(self.0[&address]), old);
        self.0.insert(address, new.to_u64());
        Ok(Exchange::Written)
    }
}

/// Letters of guest entries. `k` is followed by a protection key in hexadecimal.
const LETTERS: [(char, u32); 8] = [
    ('p', 0),
    ('w', 1),
    ('u', 2),
    ('a', 5),
    ('d', 6),
    ('s', 7),
    ('g', 8),
    ('x', 63),
];
/// Letters of EPT entries. `m` is followed by a memory type.
const EPT_LETTERS: [(char, u32); 7] = [
    ('r', 0),
    ('w', 1),
    ('x', 2),
    ('s', 7),
    ('a', 8),
    ('d', 9),
    ('e', 10),
];

struct Case {
    format: String,
    flags: Vec<String>,
    /// By level, 1 first.
    entries: [u64; 5],
    access: Vec<String>,
}

impl Case {
    fn parse(line: &str) -> Self {
        let parts: Vec<&str> = line.split('|').map(str::trim).collect();
        let [setting, entries, access] = parts[..] else {
            panic!("three parts: {line}")
        };
        let mut words = setting.split_whitespace().map(str::to_owned);
        let format = words.next().unwrap();
        let mut case = Self {
            entries: [0; 5],
            flags: words.collect(),
            access: access.split_whitespace().map(str::to_owned).collect(),
            format,
        };
        for entry in entries.split_whitespace() {
            let (level, bits) = entry.split_once('=').unwrap();
            let level: usize = level.parse().unwrap();
            case.entries[level - 1] = case.parse_bits(bits);
        }
        case
    }

    fn is_ept(&self) -> bool {
        self.format.starts_with("ept")
    }

    fn parse_bits(&self, text: &str) -> u64 {
        let letters: &[(char, u32)] = if self.is_ept() {
            &EPT_LETTERS
        } else {
            &LETTERS
        };
        let mut parts = text.split('+');
        let mut value = 0;
        let mut chars = parts.next().unwrap().chars();
        while let Some(letter) = chars.next() {
            let mut digit = || u64::from(chars.next().unwrap().to_digit(16).unwrap());
            value |= match letter {
                'k' if !self.is_ept() => digit() << 59,
                'm' if self.is_ept() => digit() << 3,
                '-' => 0,
                _ => 1 << letters.iter().find(|(name, _)| *name == letter).unwrap().1,
            };
        }
        parts.fold(value, |value, number| {
            value | 1 << number.parse::<u32>().unwrap()
        })
    }

    fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|name| name == flag)
    }

    fn value(&self, name: &str, default: u32) -> u32 {
        let found = self
            .flags
            .iter()
            .find_map(|flag| flag.strip_prefix(name)?.strip_prefix('='));
        found.map_or(default, |text| match text.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16).unwrap(),
            None => text.parse().unwrap(),
        })
    }

    fn levels(&self) -> usize {
        match self.format.as_str() {
            "32-bit" => 2,
            "pae" => 3,
            "4-level" | "ept4" => 4,
            "5-level" | "ept5" => 5,
            other => panic!("format {other}"),
        }
    }

    /// The address that is translated: another index at every level.
    fn address(&self) -> u64 {
        match self.levels() {
            2 | 3 => 0xc080_3045,
            4 => 0x0000_0180_c080_3045,
            _ => 0x0006_0180_c080_3045,
        }
    }

    fn table(&self, level: usize) -> u64 {
        (level as u64) << 16
    }

    fn entry_size(&self) -> u64 {
        if self.levels() == 2 { 4 } else { 8 }
    }

    fn slot(&self, level: usize) -> u64 {
        let index_bits = if self.levels() == 2 { 10 } else { 9 };
        let shift = 12 + index_bits * (level - 1);
        let index = self.address() >> shift & ((1 << index_bits) - 1);
        self.table(level) + self.entry_size() * index
    }

    /// The entry's value with the address of what it points to filled in.
    fn filled(&self, level: usize) -> u64 {
        let bits = self.entries[level - 1];
        let is_large = bits >> 7 & 1 == 1 && level > 1;
        let target = if is_large || level == 1 {
            0x4000_0000
        } else {
            self.table(level - 1)
        };
        bits | target
    }

    fn memory(&self) -> Memory {
        let top = if self.levels() == 3 { 2 } else { self.levels() };
        (1..=top)
            .filter(|&level| self.entries[level - 1] != 0)
            .map(|level| (self.slot(level), self.filled(level)))
            .collect()
    }

    fn controls(&self) -> GuestControls {
        let mut cr0 = Cr0::PE | Cr0::PG;
        cr0.set(Cr0::WP, self.has("wp"));
        cr0.set(Cr0::PG, !self.has("off"));
        let mut cr4 = Cr4::empty();
        let is_long = self.levels() >= 4;
        cr4.set(Cr4::PAE, self.levels() >= 3);
        cr4.set(Cr4::LA57, self.levels() == 5);
        for (name, flag) in [
            ("pse", Cr4::PSE),
            ("pge", Cr4::PGE),
            ("smep", Cr4::SMEP),
            ("smap", Cr4::SMAP),
            ("pke", Cr4::PKE),
            ("pks", Cr4::PKS),
        ] {
            cr4.set(flag, self.has(name));
        }
        let mut efer = Efer::empty();
        efer.set(Efer::NXE, self.has("nxe"));
        efer.set(Efer::LMA, is_long);
        GuestControls {
            cr0,
            cr4,
            efer,
            physical_bits: self.value("bits", 46),
            has_1g_pages: !self.has("no1g"),
            has_pse36: !self.has("nopse36"),
        }
    }

    fn guest_access(&self) -> Access {
        self.access.iter().fold(Access::empty(), |access, word| {
            access
                | match word.as_str() {
                    "read" | "super" => Access::empty(),
                    "write" => Access::WRITE,
                    "fetch" => Access::FETCH,
                    "user" => Access::USER,
                    "implicit" => Access::IMPLICIT,
                    other => panic!("access {other}"),
                }
        })
    }

    fn ept_access(&self) -> EptAccess {
        self.access.iter().fold(EptAccess::empty(), |access, word| {
            access
                | match word.as_str() {
                    "read" => EptAccess::READ,
                    "write" => EptAccess::WRITE,
                    "fetch" => EptAccess::FETCH,
                    "user" => EptAccess::USER_LINEAR,
                    other => panic!("access {other}"),
                }
        })
    }

    fn run(&self) -> String {
        if self.is_ept() {
            self.run_ept()
        } else {
            self.run_guest()
        }
    }

    fn run_guest(&self) -> String {
        let controls = self.controls();
        let mut pdptes = [0; 4];
        pdptes[3] = self.filled(3);
        let root = GuestRoot {
            cr3: self.table(self.levels()),
            pdptes,
        };
        let privilege = Privilege {
            pkru: self.value("pkru", 0),
            pkrs: self.value("pkrs", 0),
            alignment_check: self.has("ac"),
        };
        let (access, gva) = (self.guest_access(), self.address());
        let mut reference_memory = self.memory();
        let reference = naive::translate(
            &mut reference_memory,
            &controls,
            &root,
            gva,
            access,
            &privilege,
        );
        let mut memory = self.memory();
        let paging = GuestPaging::new(&controls);
        let found = paging
            .translate(
                &mut Tables(&mut memory),
                &root,
                Gva::new(gva),
                access,
                &privilege,
            )
            .map_err(|error| match error {
                GuestError::PageFault(fault) => (fault.error_code, fault.level.number()),
                GuestError::Memory { error, .. } => match error {},
            });
        assert_eq!(found, reference, "the naive walker disagrees");
        assert_eq!(
            memory, reference_memory,
            "the naive walker writes other bits"
        );
        match found {
            Ok(found) => guest_verdict(&found) + &self.written(&memory, [('a', 5), ('d', 6)]),
            Err((code, level)) => fault_verdict(code, level),
        }
    }

    fn run_ept(&self) -> String {
        let mut features = EptFeatures::PAGES_2M | EptFeatures::PAGES_1G;
        features.set(EptFeatures::EXECUTE_ONLY, self.has("xo"));
        features.set(EptFeatures::MODE_BASED_EXECUTE, self.has("mbec"));
        features.set(EptFeatures::ACCESSED_DIRTY, self.has("ad"));
        features.set(EptFeatures::PAGES_2M, !self.has("no2m"));
        features.set(EptFeatures::PAGES_1G, !self.has("no1g"));
        let (levels, bits) = (self.levels() as u8, self.value("bits", 46));
        let (root, gpa, access) = (self.table(self.levels()), self.address(), self.ept_access());
        let mut reference_memory = self.memory();
        let reference = naive::translate_ept(
            &mut reference_memory,
            levels,
            features,
            bits,
            root,
            gpa,
            access,
        );
        let mut memory = self.memory();
        let paging = EptPaging::new(levels, features, bits).unwrap();
        let found = paging.translate(&mut Tables(&mut memory), root, Gpa::new(gpa), access);
        let (verdict, text) = match found {
            Ok(t) => (
                EptVerdict::Translated {
                    address: t.address,
                    level: t.level.number(),
                    rights: t.rights,
                    is_dirty: t.is_dirty,
                    has_dirtied: t.has_dirtied,
                },
                format!(
                    "{:#x}, level {}, {}",
                    t.address,
                    t.level,
                    ept_rights(t.rights)
                ),
            ),
            Err(EptError::Fault(EptFault::Violation(violation))) => (
                EptVerdict::Violation {
                    rights: violation.rights,
                    level: violation.level.number(),
                },
                format!(
                    "violation, qualification {:#04x}, level {}",
                    violation.qualification(features),
                    violation.level
                ),
            ),
            Err(EptError::Fault(EptFault::Misconfiguration { level, .. })) => (
                EptVerdict::Misconfiguration {
                    level: level.number(),
                },
                format!("misconfiguration, level {level}"),
            ),
            Err(EptError::Memory { error, .. }) => match error {},
        };
        assert_eq!(verdict, reference, "the naive walker disagrees");
        assert_eq!(
            memory, reference_memory,
            "the naive walker writes other bits"
        );
        text + &self.written(&memory, [('a', 8), ('d', 9)])
    }

    /// The bits that the walk wrote, by level.
    fn written(&self, memory: &Memory, letters: [(char, u32); 2]) -> String {
        let mut text = String::new();
        for level in (1..=self.levels()).rev() {
            let Some(&after) = memory.get(&self.slot(level)) else {
                continue;
            };
            let written = after & !self.filled(level);
            let names: String = letters
                .iter()
                .filter(|(_, bit)| written >> bit & 1 == 1)
                .map(|(n, _)| n)
                .collect();
            if !names.is_empty() {
                let _ = write!(text, " {level}+{names}");
            }
        }
        if text.is_empty() {
            text
        } else {
            format!(", wrote{text}")
        }
    }
}

fn guest_verdict(found: &Translation) -> String {
    let letter = |right, letter| {
        if found.rights.contains(right) {
            letter
        } else {
            '-'
        }
    };
    let rights: String = [
        letter(Rights::WRITABLE, 'w'),
        letter(Rights::USER, 'u'),
        letter(Rights::EXECUTABLE, 'x'),
        letter(Rights::GLOBAL, 'g'),
        letter(Rights::DIRTY, 'd'),
    ]
    .iter()
    .collect();
    let key = if found.key == 0 {
        String::new()
    } else {
        format!(", key {}", found.key)
    };
    format!(
        "{:#x}, 2^{} bytes, {rights}{key}",
        found.gpa.get(),
        found.page_shift
    )
}

fn fault_verdict(code: ErrorCode, level: u8) -> String {
    let names = [
        (ErrorCode::PRESENT, "P"),
        (ErrorCode::WRITE, "W"),
        (ErrorCode::USER, "U"),
        (ErrorCode::RSVD, "RSVD"),
        (ErrorCode::FETCH, "I/D"),
        (ErrorCode::PK, "PK"),
    ];
    let set: Vec<&str> = names
        .iter()
        .filter(|(bit, _)| code.contains(*bit))
        .map(|(_, name)| *name)
        .collect();
    let set = if set.is_empty() {
        "0".to_owned()
    } else {
        set.join(" ")
    };
    format!("#PF {set}, level {level}")
}

fn ept_rights(rights: EptRights) -> String {
    let letter = |right, letter| if rights.contains(right) { letter } else { '-' };
    [
        letter(EptRights::READ, 'r'),
        letter(EptRights::WRITE, 'w'),
        letter(EptRights::EXECUTE, 'x'),
        letter(EptRights::EXECUTE_USER, 'e'),
    ]
    .iter()
    .collect()
}

/// Checks one file, or writes its verdicts; gives the number of cases.
fn check(name: &str) -> usize {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    let text = std::fs::read_to_string(&path).unwrap();
    let is_blessing = std::env::var_os("EPTIDE_BLESS").is_some();
    let mut blessed = String::new();
    let mut wrong = Vec::new();
    let mut cases = 0;
    let mut lines = text.lines().enumerate().peekable();
    while let Some((number, line)) = lines.next() {
        blessed += line;
        blessed += "\n";
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        cases += 1;
        let verdict = Case::parse(line).run();
        let golden = lines.next_if(|(_, next)| next.starts_with("  "));
        let golden = golden.map_or("", |(_, next)| next.trim());
        let _ = writeln!(blessed, "  {verdict}");
        if golden != verdict {
            wrong.push(format!(
                "{name}:{}: {line}\n  golden: {golden}\n  found:  {verdict}",
                number + 1
            ));
        }
    }
    if is_blessing {
        std::fs::write(&path, blessed).unwrap();
    } else {
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
    cases
}

#[test]
fn walks_are_as_blessed() {
    let files = [
        "32-bit.txt",
        "pae.txt",
        "4-level.txt",
        "5-level.txt",
        "rights.txt",
        "ept.txt",
    ];
    let cases: usize = files.into_iter().map(check).sum();
    assert!(cases >= 300, "{cases} cases");
}
