//! A walk that a person can read.

use crate::mmu::Mmu;
use crate::spte::Spte;
use crate::vcpu::Vcpu;
use arch::addr::Gpa;
use arch::paging::{EptPaging, Level, ept_entry as ept};
use std::fmt::Write;

impl Mmu {
    /// The entries that translate `gpa` for the vCPU, one a line, each with its bits spelled out.
    pub fn dump_walk(&self, vcpu: &Vcpu, gpa: Gpa) -> String {
        let mut text = format!("walk of {gpa}");
        let Some(root) = &vcpu.root else {
            return text + ": no root";
        };
        let reading = vcpu.gate.read();
        let _ = writeln!(text, ", root {} ({:?})", root.address(), root.space());
        let path = self.path(&reading, root, gpa.gfn());
        if path.is_empty() {
            text += "  the root is invalid\n";
        }
        for (level, entry) in path {
            let _ = writeln!(
                text,
                "  level {level}: {:#018x} {}",
                entry.raw(),
                self.describe(level, entry)
            );
        }
        text
    }

    fn describe(&self, level: Level, entry: Spte) -> String {
        if entry == Spte::EMPTY {
            return "empty".into();
        }
        if entry.is_frozen() {
            return "frozen: being torn down".into();
        }
        if entry.is_mmio() {
            let gfn = self.mmio_format.gfn(entry);
            return format!("MMIO, gfn {gfn}, generation {}", entry.mmio_generation());
        }
        let raw = entry.raw();
        let flag = |bit: u64, name: char| if raw & bit != 0 { name } else { '-' };
        let rights: String = [
            flag(ept::READ, 'r'),
            flag(ept::WRITE, 'w'),
            flag(ept::EXECUTE, 'x'),
            flag(ept::ACCESSED, 'A'),
            flag(ept::DIRTY, 'D'),
        ]
        .iter()
        .collect();
        let kind = if !entry.is_present() {
            "not the MMU's"
        } else if entry.is_table(level) {
            "table"
        } else if entry.is_aged() {
            "page, aged"
        } else if !entry.is_writable() && entry.may_become_writable() {
            "page, write-protected"
        } else {
            "page"
        };
        let fault = if self.is_malformed(level, entry) {
            ", MALFORMED"
        } else {
            ""
        };
        format!("{rights} {kind} at {}{fault}", entry.table_address())
    }

    /// Whether the processor rejects a present entry.
    fn is_malformed(&self, level: Level, entry: Spte) -> bool {
        let raw = entry.raw();
        match &self.ept {
            EptPaging::Four(mode) => {
                mode.is_present(raw) && mode.is_malformed(raw, level, mode.is_leaf(raw, level))
            }
            EptPaging::Five(mode) => {
                mode.is_present(raw) && mode.is_malformed(raw, level, mode.is_leaf(raw, level))
            }
        }
    }

    /// The level of the first entry on the way to `gpa` that the processor rejects.
    pub(crate) fn malformed_level(&self, vcpu: &Vcpu, gpa: Gpa) -> Option<Level> {
        let root = vcpu.root.as_ref()?;
        let reading = vcpu.gate.read();
        let path = self.path(&reading, root, gpa.gfn());
        path.into_iter()
            .find(|&(level, entry)| self.is_malformed(level, entry))
            .map(|(level, _)| level)
    }
}
